"""Losses on softmax probabilities: B = m (diag(p) − p pᵀ) at every position, with a mass m from the target."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from curvalg.errors import LossError
from curvalg.expr.facts import LossFacts
from curvalg.losses.loss import Loss, LossPoint
from curvalg.losses.validation import check_nonnegative, check_range, floating


class SoftmaxPoint(LossPoint[Tensor]):
    r"""One output z of a softmax loss, of shape (N, …, C, …): p = softmax(z), mass m, and all of B.

    A subclass adds its value and the linear part of its gradient.

    Args:
        facts: the facts of the loss.
        output: z, detached.
        axis: the class axis, not negative.
        mass: m of each position, of the output's shape without the class axis.
        labels: the class of each position, of the same shape.
    """

    fresh = True

    def __init__(self, facts: LossFacts, output: Tensor, axis: int, mass: Tensor, labels: Tensor) -> None:
        self.facts, self.output, self.axis, self.labels = facts, output, axis, labels
        self.probabilities = output.softmax(axis)
        self.likeliest = self.probabilities.argmax(axis, keepdim=True)
        self.weights = mass.unsqueeze(axis)
        self.noise_shape = tuple(mass.shape)

    def hvp(self, tangent: Tensor) -> Tensor:
        """m p ∘ (d − ⟨p, d⟩) with d = t − t_k for the likeliest class k, which changes nothing as B 1 = 0.

        Where p_k is nearly 1, t_k − ⟨p, t⟩ would lose all digits; now it is a sum over the other classes.
        """
        p = self.probabilities
        difference = tangent - tangent.gather(self.axis, self.likeliest)
        mean = (p * difference).sum(self.axis, keepdim=True)
        # With a large vocabulary these are the largest tensors of a product: one buffer, written in place.
        return difference.sub_(mean).mul_(p).mul_(self.weights)

    def balanced(self, deviation: Tensor) -> Tensor:
        """A sum of p − e_c, with its likeliest class as minus the sum of the others, where p_k − 1 would lose digits."""
        return balance(deviation, self.probabilities, self.likeliest, self.axis)

    @property
    def rank(self) -> int:
        """The number of classes less one, or 1 (a column of zeros) for a single class."""
        return max(1, self.output.shape[self.axis] - 1)

    def factor(self) -> Tensor:
        r"""The C − 1 Cholesky columns L_j = √(p_j r_{j+1}/r_j) (e_j − Σ_{i>j} p_i/r_{j+1} e_i), r_j = Σ_{i≥j} p_i.

        The tails r are summed from the end instead of 1 − Σ_{i<j} p_i, which loses all digits when p saturates; a
        tail of zero gives the zero column.
        """
        return self.factor_part(0, self.rank)

    def factor_part(self, start: int, stop: int) -> Tensor:
        """Some of these columns; of a large vocabulary all together are as many outputs as it has words."""
        if self.output.shape[self.axis] == 1:
            return torch.zeros_like(self.probabilities)[None]
        p = self.probabilities.movedim(self.axis, -1)
        tails = p.flip(-1).cumsum(-1).flip(-1)
        tail, after = tails[..., start:stop], tails[..., start + 1 : stop + 1]
        pivot = (p[..., start:stop] * _ratio(after, tail)).sqrt()
        classes = torch.arange(p.shape[-1], device=p.device)
        number = classes[start:stop, None]
        unit, below = (classes == number).to(p.dtype), (classes > number).to(p.dtype)
        # (…, columns, C): positions first until the last line.
        # Of the classes above, p divided by a tail that is next to nothing would be infinite.
        columns = pivot.unsqueeze(-1) * (unit - _ratio(below * p.unsqueeze(-2), after.unsqueeze(-1)))
        return self._root_mass() * columns.movedim(-2, 0).movedim(-1, self.axis + 1)

    def pseudo_gradients(self, uniform: Tensor, *, fisher: bool = False) -> Tensor:
        """√m (p − e_ỹ) with ỹ ~ p by inversion of the distribution function, one uniform number a position.

        B is the Fisher matrix here, so ``fisher`` changes nothing.
        """
        self.require_noise(uniform)
        p, axis = self.probabilities, self.axis
        root = self._root_mass()
        # As precise as the uniform numbers, which a class of probability 1e-8 is to be drawn by.
        steps = p.to(torch.promote_types(p.dtype, uniform.dtype)).cumsum(axis)
        total = steps.select(axis, -1)
        # Below the total even after rounding, so that a class of probability zero is never drawn.
        level = torch.minimum(uniform.to(steps.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
        drawn = (steps <= level.unsqueeze(axis + 1)).sum(axis + 1, keepdim=True).clamp(max=p.shape[axis] - 1)
        deviation = p.expand(len(uniform), *p.shape)
        deviation = deviation.scatter_add(axis + 1, drawn, -torch.ones_like(drawn, dtype=p.dtype))
        return root * balance(deviation, p[None], self.likeliest[None], axis + 1)

    def _root_mass(self) -> Tensor:
        check_nonnegative(self.facts.name, self.weights, "use class weights that are not negative")
        return self.weights.sqrt()


class SoftmaxLoss(Loss):
    """A loss on softmax probabilities along ``class_axis``."""

    @property
    @abstractmethod
    def class_axis(self) -> int:
        """The axis of the output that holds classes."""

    def axis_of(self, output: Tensor) -> int:
        """The class axis, counted from the front.

        Raises:
            LossError: if the output has no such axis, or if that is the axis of the samples.
        """
        name, axis, ndim = self.name, self.class_axis, output.ndim
        if ndim < 2:
            raise LossError(
                f"{name}: expected an output (N, C, …) or, with class_axis=-1, (N, …, C), got the unbatched shape "
                f"{tuple(output.shape)}; add a sample axis with unsqueeze(0)"
            )
        if not -ndim <= axis < ndim or axis % ndim == 0:
            raise LossError(
                f"{name}: expected class_axis to name an axis of the output {tuple(output.shape)} other than the "
                f"first, which holds the samples, got {axis}; use 1 or -1"
            )
        return axis % ndim

    def checked_output(self, output: object) -> tuple[Tensor, int]:
        """The output as a floating-point tensor, and its class axis counted from the front."""
        tensor = floating(self.name, output)
        return tensor, self.axis_of(tensor)

    def check_probabilities(self, target: Tensor, output: Tensor | None = None) -> None:
        """Raise LossError unless probability targets have the output's shape and no negative entry."""
        name = self.name
        if output is not None and target.shape != output.shape:
            expected = tuple(size for axis, size in enumerate(output.shape) if axis != self.axis_of(output))
            raise LossError(
                f"{name}: expected probability targets (floating point) of the output's shape {tuple(output.shape)}, "
                f"got {tuple(target.shape)}; for class indices of shape {expected} use target.long()"
            )
        self.axis_of(target)
        check_range(name, target, target >= 0, "probability targets that are not negative")


def balance(deviation: Tensor, p: Tensor, likeliest: Tensor, axis: int) -> Tensor:
    """A tensor whose sums along an axis vanish, with one entry k of each replaced by minus the sum of the others.

    Only where p_k > 1/2: there a sum of multiples of p − e_c cancels in k, and nowhere else.

    Args:
        deviation: written into.
        p: probabilities, broadcastable to it, as is the next.
        likeliest: k, of size 1 along the axis.
        axis: of the classes.
    """
    shape = list(deviation.shape)
    shape[axis] = 1
    index = likeliest.expand(shape)
    own = deviation.gather(axis, index)
    rest = deviation.scatter_(axis, index, 0.0).sum(axis, keepdim=True)
    saturated = p.expand_as(deviation).gather(axis, index) > 0.5
    return deviation.scatter_(axis, index, torch.where(saturated, -rest, own))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Numerator / denominator, 0 where the denominator is 0 (the numerator, a part of it, is then 0 too)."""
    zero = denominator == 0
    return torch.where(zero, 0.0, numerator / torch.where(zero, 1.0, denominator))

"""The contract of a loss: closed forms in output space, numerators only."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, Literal, TypeAlias, TypeVar

from torch import Tensor

from curvalg.errors import LossError
from curvalg.expr.facts import LossFacts

Reduction: TypeAlias = Literal["mean", "sum"]
Structure: TypeAlias = Any
"""A tensor, or any nesting of tuples, lists and dictionaries of tensors, as a model or data set gives it."""

OutputT = TypeVar("OutputT")


class LossPoint(ABC, Generic[OutputT]):
    r"""A loss at one (output, target): value, derivatives and square roots of its Hessian B = ∂²/∂z².

    Everything is unnormalised: sums of numerators, not yet divided by a denominator. Nothing here refers to the
    graph of the model, and ``hvp`` and ``fisher_hvp`` run under ``torch.func.vmap``.

    Attributes:
        facts: the facts of the loss.
        labels: the class of each position (no class axis), ignored positions holding some valid class; the most
            likely class for probability targets; None for a loss without classes.
        weights: α̂ of each position, broadcastable to the output (of size 1 along the class axis).
        noise_shape: shape of the uniform numbers that one draw of ``pseudo_gradients`` needs, samples first.
    """

    fresh: ClassVar[bool] = False
    """Whether ``hvp`` returns a tensor of its own, which the caller may write into."""
    facts: LossFacts
    labels: Tensor | None
    weights: Tensor
    noise_shape: tuple[int, ...]

    @abstractmethod
    def value(self) -> Tensor:
        """The sum of the numerators, a scalar."""

    @abstractmethod
    def gradient(self) -> OutputT:
        """∂ value / ∂ output, with the structure of the output."""

    @abstractmethod
    def hvp(self, tangent: OutputT) -> OutputT:
        """The product B t, linear in the tangent t and of its structure."""

    def fisher_hvp(self, tangent: OutputT) -> OutputT:
        """The product with the Fisher matrix of the likelihood in output space, weights outside.

        Raises:
            LossError: if the loss is not a negative log-likelihood.
        """
        self.require_likelihood()
        if not self.facts.fisher_is_ggn:
            raise NotImplementedError(f"{self.facts.name}: a Fisher matrix unlike the Hessian needs its own product")
        return self.hvp(tangent)

    @property
    def rank(self) -> int:
        """The number of columns that :meth:`factor` gives."""
        return 1

    @abstractmethod
    def factor(self) -> Tensor:
        """Columns whose outer products sum to B, position by position, of shape (columns, \\*output.shape).

        Raises:
            LossError: if B is not positive semi-definite.
        """

    def factor_part(self, start: int, stop: int) -> Tensor:
        """The columns ``start`` to ``stop`` of :meth:`factor`; without the others, where these take much memory."""
        return self.factor()[start:stop]

    @abstractmethod
    def pseudo_gradients(self, uniform: Tensor, *, fisher: bool = False) -> Tensor:
        """Random s with E s sᵀ = B, or the Fisher matrix, independent between positions.

        Args:
            uniform: numbers in (0, 1), of shape (samples, \\*noise_shape).
            fisher: whether E s sᵀ is the Fisher matrix rather than B.

        Returns:
            One draw each, not scaled by samples^-1/2, of shape (samples, \\*output.shape).

        Raises:
            LossError: if the matrix is not positive semi-definite, or if there is no likelihood.
        """

    def require_likelihood(self) -> None:
        """Raise LossError unless the loss is a negative log-likelihood."""
        if not self.facts.likelihood:
            raise LossError(
                f"a Fisher matrix needs a loss that is the negative logarithm of a probability; {self.facts.name} is "
                "not declared as one. Use the ggn, or a likelihood such as CrossEntropy, MSE or BCEWithLogits"
            )

    def require_noise(self, uniform: Tensor) -> None:
        """Raise LossError unless ``uniform`` has the shape (samples, \\*noise_shape)."""
        if tuple(uniform.shape[1:]) != self.noise_shape or uniform.ndim == 0:
            expected = ", ".join(("samples", *map(str, self.noise_shape)))
            raise LossError(f"expected uniform numbers of shape ({expected}), got {tuple(uniform.shape)}")


class Loss(ABC):
    r"""Closed forms of a loss ℓ(z, y) = Σ numerators / denominator in output space.

    A subclass is a frozen dataclass whose fields are the options. Numerators and denominators are both additive over
    batches, so that the quotient of the two sums is the loss of the whole data set however it is split.

    Attributes:
        reduction: ``"mean"`` if the numerators are to be divided by the denominator, ``"sum"`` if not; None for a
            callable whose reduction nobody has said yet.
    """

    reduction: str | None

    @property
    def name(self) -> str:
        """The name of the loss in messages."""
        return type(self).__name__

    @property
    @abstractmethod
    def facts(self) -> LossFacts:
        """The facts that decide the facts of curvature matrices."""

    @property
    def class_axis(self) -> int | None:
        """The axis of the output that holds classes, possibly negative; None for an elementwise loss."""
        return None

    @property
    def positions(self) -> bool:
        """Whether the loss is a sum over positions known from its target and class axis, each a sample if asked for."""
        return True

    @abstractmethod
    def weights(self, target: Structure) -> Tensor:
        """α̂, the unnormalised weight of each position (no class axis), from the target alone; 0 where ignored."""

    @abstractmethod
    def denominator(self, target: Structure) -> Tensor | float:
        """The number that ``reduction="mean"`` divides by, from the target alone; additive over batches."""

    @abstractmethod
    def at(self, output: Structure, target: Structure) -> LossPoint[Any]:
        """The loss at one output and target.

        Raises:
            LossError: if shapes, data types or ranges do not fit.
        """

    def numerator(self, output: Structure, target: Structure) -> Tensor:
        """The sum of numerators, with a graph to the output and to every tensor that the loss depends on.

        All else here is closed forms of a detached output; derivatives of curvature are taken of this.

        Raises:
            LossError: the loss does not give it.
        """
        raise LossError(
            f"{self.name} gives closed forms alone; derivatives of curvature need numerator(output, target), written "
            "in differentiable operations of torch"
        )

    def live_denominator(self, target: Structure) -> Tensor | float:
        """The denominator, with a graph to the tensors of the loss where it depends on them."""
        return self.denominator(target)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors the loss depends on, such as class weights, by name."""
        return {}


def width(tensor: Tensor) -> int:
    """The number of entries per row."""
    return math.prod(tensor.shape[1:])


def rows(tensor: Tensor) -> Tensor:
    """The tensor as a matrix with its rows; ``reshape(n, -1)`` is ambiguous for n = 0."""
    return tensor.reshape(len(tensor), width(tensor))

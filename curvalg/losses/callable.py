"""Any callable as a loss, by automatic differentiation in output space."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvalg.errors import CurvalgWarning, LossError
from curvalg.expr.facts import LossFacts
from curvalg.losses.calls import OutputAlone, call, name_of, takes_output_alone
from curvalg.losses.closed_forms.cross_entropy import CrossEntropy
from curvalg.losses.loss import Loss, LossPoint, Structure, rows, width
from curvalg.losses.output_blocks import square_roots
from curvalg.losses.validation import check_reduction, floating
from curvalg.tensors import trees


@dataclass(frozen=True, eq=False)
class CallableLoss(Loss):
    r"""A callable (output, target) → scalar, or of the output alone, that couples no samples; all derivatives by autograd.

    A mean loss has rows · fn(output, target) as numerator and the number of rows as denominator, which is right if
    every row counts the same; a sum loss is taken as it is. All weights are 1.

    Args:
        fn: the callable; its output may have any structure of tensors whose first axis holds the samples. Of the output alone
            where it takes one argument and not two; the target then only says how many rows there are.
        reduction: ``"mean"`` or ``"sum"`` over rows; None if not known (taken as it is, see ``infer_reduction``).
        class_axis: the axis of the output that holds classes, if any.

    Raises:
        LossError: if the reduction is unknown, or ``fn`` not callable.

    Reference: :func:`torch.autograd.grad`.

    >>> loss = CallableLoss(lambda output, target: (output - target).pow(4).sum(), reduction="sum")
    >>> loss.at(torch.tensor([[1.0]]), torch.tensor([[0.0]])).hvp(torch.tensor([[1.0]]))
    tensor([[12.]])
    """

    fn: Callable[[Any, Any], Tensor]
    reduction: str | None = None
    class_axis: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise LossError(f"expected a callable (output, target) -> scalar, got {type(self.fn).__name__}")
        if takes_output_alone(self.fn):
            object.__setattr__(self, "fn", OutputAlone(self.fn))  # type: ignore[arg-type]
        check_reduction(self.name, self.reduction, ("mean", "sum", None))  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """The name of the loss in messages."""
        return name_of(self.fn)

    @property
    def facts(self) -> LossFacts:
        """Nothing is known of a callable."""
        return LossFacts(self.name, classes=self.class_axis is not None)

    @property
    def positions(self) -> bool:
        """False: a callable does not say where its positions are."""
        return False

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of a module, tensor keywords of a partial."""
        fn = self.fn.fn if isinstance(self.fn, OutputAlone) else self.fn
        if isinstance(fn, nn.Module):
            return {**dict(fn.named_parameters()), **dict(fn.named_buffers())}
        if isinstance(fn, functools.partial):
            return {name: value for name, value in fn.keywords.items() if isinstance(value, Tensor)}
        return {}

    def weights(self, target: Structure) -> Tensor:
        """One for every row."""
        first = self._first(target)
        return torch.ones(len(first), device=first.device)

    def denominator(self, target: Structure) -> float:
        """The number of rows of the target's first tensor."""
        return float(len(self._first(target)))

    def numerator(self, output: Structure, target: Structure) -> Tensor:
        """What is differentiated: rows · fn for a mean, fn otherwise."""
        scale = self.denominator(target) if self.reduction == "mean" else 1.0  # first: it checks the target
        value: Tensor = call(self.fn, output, target)
        return value * scale if scale != 1.0 and isinstance(value, Tensor) else value

    def at(self, output: Structure, target: Structure) -> CallablePoint:
        """The loss at an output of any structure, and a target."""
        return CallablePoint(self, output, target)

    def _first(self, target: Structure) -> Tensor:
        for leaf in trees.tensors(target):
            if leaf.ndim > 0:
                return leaf
        raise LossError(
            f"{self.name}: expected a target with a tensor whose first axis holds the samples, got "
            f"{type(target).__name__}; Problem's target= picks the target (it may be the input) from a batch"
        )


class CallablePoint(LossPoint[Structure]):
    """A callable at one output and target; flat results have the output's shape, or (n, −1) for several outputs.

    The only graph held is that of the callable, on a detached copy of the output: recorded once, so that a product
    is one backward pass, and outside of ``torch.func.vmap``, which forbids new leaves.
    """

    labels: Tensor | None = None

    def __init__(self, loss: CallableLoss, output: Structure, target: Structure) -> None:
        self.facts = loss.facts
        leaves, self.form = trees.flatten(output)
        detached = [floating(loss.name, leaf) for leaf in leaves]
        if not detached or len({len(leaf) for leaf in detached}) != 1:
            raise LossError(
                f"{loss.name}: expected an output of tensors with the samples on the first axis, got the shapes "
                f"{[tuple(leaf.shape) for leaf in detached]}; adapt it with Problem's forward="
            )
        with torch.enable_grad():
            self.leaves = [leaf.clone().requires_grad_() for leaf in detached]
            # Given away as views: a callable that works in place must not hit a leaf, nor our copy.
            views = [leaf.clone() for leaf in self.leaves]
            self.numerator = _checked(loss.name, loss.numerator(trees.unflatten(self.form, views), target))
            self.gradients = torch.autograd.grad(
                self.numerator, self.leaves, create_graph=True, allow_unused=True, materialize_grads=True
            )
        self.rows = len(detached[0])
        self.shape = tuple(detached[0].shape) if len(detached) == 1 else (self.rows, sum(map(width, detached)))
        first = detached[0]
        self.weights = torch.ones([self.rows] + [1] * (len(self.shape) - 1), dtype=first.dtype, device=first.device)
        self.noise_shape = (self.rows, sum(map(width, detached)))

    def value(self) -> Tensor:
        """The value of the numerator."""
        return self.numerator.detach()

    def gradient(self) -> Structure:
        """The gradient by one backward pass."""
        return trees.unflatten(self.form, [gradient.detach() for gradient in self.gradients])

    def hvp(self, tangent: Structure) -> Structure:
        """The Hessian-vector product by a backward pass through the gradient.

        Not forward over reverse: torch 2.13 raises for ``jvp(grad(mse_loss))``, as its zero tensors are immutable.
        """
        return trees.unflatten(self.form, self._product(trees.leaves(tangent)))

    @property
    def rank(self) -> int:
        """The number of entries of a sample."""
        return self.noise_shape[1]

    def factor(self) -> Tensor:
        """√λ q of every eigenpair of every sample's block, as many columns as a sample has entries."""
        columns = square_roots(self.facts.name, self._blocks())
        return columns.movedim(-1, 0).reshape(self.noise_shape[1], *self.shape)

    def pseudo_gradients(self, uniform: Tensor, *, fisher: bool = False) -> Tensor:
        """Columns of the factor, summed with one random sign per sample and column."""
        if fisher:
            self.require_likelihood()
        self.require_noise(uniform)
        columns = self.factor().reshape(self.noise_shape[1], *self.noise_shape)
        signs = torch.where(uniform < 0.5, -1.0, 1.0).to(columns.dtype)
        return torch.einsum("snk,knd->snd", signs, columns).reshape(len(uniform), *self.shape)

    def _product(self, tangents: list[Tensor]) -> list[Tensor]:
        # A loss that is linear in some output gives a gradient without a graph.
        live = [(g, t) for g, t in zip(self.gradients, tangents, strict=True) if g.requires_grad]
        if not live:
            return [torch.zeros_like(tangent) for tangent in tangents]
        try:
            return list(
                torch.autograd.grad(
                    [gradient for gradient, _ in live],
                    self.leaves,
                    grad_outputs=[tangent for _, tangent in live],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
        except (RuntimeError, NotImplementedError) as error:
            if "is not implemented" not in str(error):
                raise
            raise LossError(
                f"{self.facts.name}: the loss has no second derivative in torch ({str(error).strip().splitlines()[0]}), which "
                "Hessian and Gauss-Newton matrices need; write it in elementary operations. Gradient covariances need none"
            ) from error

    def _blocks(self) -> Tensor:
        """The Hessian's block of every sample, of shape (n, d, d): column j of all samples in one product."""
        widths = [width(leaf) for leaf in self.leaves]
        unit = torch.eye(self.noise_shape[1], dtype=self.weights.dtype, device=self.weights.device)

        def column(direction: Tensor) -> Tensor:
            parts = torch.split(direction.expand(self.rows, -1), widths, 1)
            images = self._product([part.reshape(leaf.shape) for part, leaf in zip(parts, self.leaves, strict=True)])
            return torch.cat([rows(image) for image in images], 1)

        blocks: Tensor = torch.func.vmap(column, out_dims=2)(unit)
        return (blocks + blocks.mT) / 2


@dataclass(frozen=True, eq=False)
class NLL(CallableLoss):
    """torch's negative log-likelihood of log-probabilities, linear in its input: by autograd, B = 0.

    Made by ``resolve_loss``; a callable but for numerators and denominators, which follow class weights and ignored
    labels as those of CrossEntropy do. Constructing it warns that the generalised Gauss-Newton matrix is zero.

    Args:
        weight: ω of each class, shape (C,), or None for ones.
        ignore_index: the label of targets that do not count.

    Reference: :class:`torch.nn.NLLLoss`.
    """

    weight: Tensor | None = None
    ignore_index: int = -100

    def __post_init__(self) -> None:
        super().__post_init__()
        warnings.warn(
            "NLLLoss is linear in its input (log-probabilities), so its ggn is zero; use CrossEntropy on the logits, "
            "with log_softmax taken out of the model",
            CurvalgWarning,
            stacklevel=3,
        )

    @classmethod
    def from_module(cls, module: nn.NLLLoss) -> NLL:
        """The loss with the options of a torch module."""
        return cls.from_options(weight=module.weight, ignore_index=module.ignore_index, reduction=module.reduction)

    @classmethod
    def from_options(cls, *, weight: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean") -> NLL:
        """The loss with the options of :func:`torch.nn.functional.nll_loss`."""
        check_reduction("NLLLoss", reduction)
        return cls(
            functools.partial(torch.nn.functional.nll_loss, weight=weight, ignore_index=ignore_index, reduction="sum"),
            reduction=reduction,
            class_axis=1,
            weight=weight,
            ignore_index=ignore_index,
        )

    @property
    def name(self) -> str:
        """The name of the loss in messages."""
        return "NLLLoss"

    def weights(self, target: Structure) -> Tensor:
        """ω_y of every position, 0 where ignored."""
        return self._labelled().weights(target)

    def denominator(self, target: Structure) -> float:
        """Σ ω_y over positions that are not ignored."""
        return self._labelled().denominator(target)

    def numerator(self, output: Structure, target: Structure) -> Tensor:
        """The sum −Σ ω_y z_y."""
        value: Tensor = self.fn(output, target)
        return value

    def at(self, output: Structure, target: Structure) -> CallablePoint:
        """The loss at log-probabilities (N, C, d1, …) and class indices."""
        weights = self.weights(target)  # checks the target first
        point = super().at(output, target)
        point.weights = weights.to(point.weights).unsqueeze(1)
        point.labels = torch.where(target == self.ignore_index, 0, target)
        return point

    def _labelled(self) -> CrossEntropy:
        return CrossEntropy(weight=self.weight, ignore_index=self.ignore_index)


def _checked(name: str, value: object) -> Tensor:
    """The value of a callable, if it is a scalar that depends on the output."""
    if not isinstance(value, Tensor):
        raise LossError(
            f"{name}: expected a scalar tensor, got {type(value).__name__}; a loss must stay in torch (no .item())"
        )
    if value.numel() != 1 or value.ndim > 1:
        raise LossError(
            f"{name}: expected a scalar, got a tensor of shape {tuple(value.shape)}; sum or average over it"
        )
    if not value.requires_grad:
        raise LossError(
            f"{name}: the value does not depend on the output; do not detach it, use no_grad, or leave torch"
        )
    return value.reshape(())

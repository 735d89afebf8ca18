"""Kullback-Leibler divergences: of softmax probabilities (from logits), and torch's own, linear in its input."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvalg.errors import CurvalgWarning, LossError
from curvalg.expr.facts import LossFacts
from curvalg.losses.closed_forms.elementwise import ElementwiseLoss
from curvalg.losses.closed_forms.softmax import SoftmaxLoss, SoftmaxPoint
from curvalg.losses.loss import Structure
from curvalg.losses.validation import check_reduction, real_target

KLReduction: TypeAlias = Literal["batchmean", "mean", "sum"]
Divisor: TypeAlias = Literal["rows", "elements"]


@dataclass(frozen=True, kw_only=True)
class _Divided:
    """The reductions of KL divergences: ``"batchmean"`` is a mean over rows, ``"mean"`` one over elements.

    ``"batchmean"`` is kept as ``reduction="mean", divisor="rows"``, so that ``reduction`` means the same everywhere.
    """

    log_target: bool = False
    reduction: KLReduction = "batchmean"
    divisor: Divisor | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_reduction(name, self.reduction, ("batchmean", "mean", "sum"))
        if self.divisor not in (None, "rows", "elements"):
            raise LossError(f"{name}: expected divisor to be 'rows', 'elements' or None, got {self.divisor!r}")
        if self.reduction == "batchmean" and self.divisor == "elements":
            raise LossError(f"{name}: reduction='batchmean' divides by rows; for elements use reduction='mean'")
        if self.reduction == "batchmean":
            object.__setattr__(self, "divisor", "rows")
            object.__setattr__(self, "reduction", "mean")
        elif self.divisor is None:
            object.__setattr__(self, "divisor", "elements")

    def denominator(self, target: Structure) -> float:
        """The number of rows (``"batchmean"``) or of elements (``"mean"``)."""
        tensor = real_target(type(self).__name__, target)
        return float(len(tensor) if self.divisor == "rows" else tensor.numel())


@dataclass(frozen=True, kw_only=True)
class KLDivWithLogits(_Divided, SoftmaxLoss):
    r"""KL divergence of softmax probabilities from a target q: Σ_c q_c (log q_c − log softmax(z)_c).

    The curvature of :class:`torch.nn.KLDivLoss` alone is zero, as it is linear in log p; with log_softmax inside,
    B = m (diag(p) − p pᵀ) with m = Σ_c q_c = α̂ at every position.

    Args:
        log_target: whether the target holds log q.
        reduction: ``"batchmean"`` (divides by rows), ``"mean"`` (by elements) or ``"sum"``.
        divisor: ``"rows"`` or ``"elements"``; follows from ``reduction`` if None.
        class_axis: the axis of the output that holds the classes.

    Raises:
        LossError: if an option is unknown.

    Reference: :func:`torch.nn.functional.kl_div` of :func:`torch.nn.functional.log_softmax`.

    >>> point = KLDivWithLogits().at(torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]))
    >>> point.value().item(), point.hvp(torch.tensor([[1.0, 0.0]]))
    (0.0, tensor([[ 0.2500, -0.2500]]))
    """

    class_axis: int = 1

    @classmethod
    def from_module(cls, module: nn.KLDivLoss) -> KLDivWithLogits:
        """The loss of logits that applies this torch module to their log_softmax."""
        return cls(log_target=module.log_target, reduction=module.reduction)  # type: ignore[arg-type]  # str in torch

    @property
    def facts(self) -> LossFacts:
        """Convex; a likelihood with m as sample weight."""
        return LossFacts("KLDivWithLogits", convex=True, likelihood=True, fisher_is_ggn=True, classes=True)

    def weights(self, target: Structure) -> Tensor:
        """The mass m of each position."""
        q = self._probabilities(target)
        return q.sum(self.axis_of(q))

    def numerator(self, output: Structure, target: Structure) -> Tensor:
        return self.total(output, self.axis_of(output), real_target("KLDivWithLogits", target).to(output.dtype))

    def total(self, output: Tensor, axis: int, target: Tensor) -> Tensor:
        """The sum of numerators, by torch."""
        return F.kl_div(output.log_softmax(axis), target, reduction="sum", log_target=self.log_target)

    def at(self, output: Structure, target: Structure) -> SoftmaxPoint:
        """The loss at logits (N, C, d1, …), by class_axis, and a floating-point target of the same shape."""
        output, axis = self.checked_output(output)
        return _KLPoint(self, output, axis, self._probabilities(target, output), target.detach().to(output.dtype))

    def _probabilities(self, target: Structure, output: Tensor | None = None) -> Tensor:
        tensor = real_target("KLDivWithLogits", target)
        if not tensor.is_floating_point():
            raise LossError(
                f"KLDivWithLogits: expected probability targets (floating point), got {tensor.dtype}; "
                "use CrossEntropy for class indices"
            )
        dtype = tensor.dtype if output is None else output.dtype
        q = tensor.to(dtype).exp() if self.log_target else tensor.to(dtype)
        self.check_probabilities(q, output)
        return q


class _KLPoint(SoftmaxPoint):
    def __init__(self, loss: KLDivWithLogits, output: Tensor, axis: int, q: Tensor, target: Tensor) -> None:
        self.loss, self.q, self.target = loss, q, target
        super().__init__(loss.facts, output, axis, q.sum(axis), q.argmax(axis))

    def value(self) -> Tensor:
        """The sum of numerators, by torch."""
        return self.loss.total(self.output, self.axis, self.target)

    def gradient(self) -> Tensor:
        """The gradient m p − q."""
        return self.balanced(self.weights * self.probabilities - self.q)


@dataclass(frozen=True, kw_only=True)
class KLDiv(_Divided, ElementwiseLoss):
    r"""KL divergence of log-probabilities z from a target q: Σ q (log q − z), linear in z, so B = 0.

    Constructing it warns that the generalised Gauss-Newton matrix is zero.

    Args:
        log_target: whether the target holds log q.
        reduction: ``"mean"`` (divides by elements), ``"batchmean"`` (by rows) or ``"sum"``.
        divisor: ``"rows"`` or ``"elements"``; follows from ``reduction`` if None.

    Raises:
        LossError: if an option is unknown.

    Reference: :class:`torch.nn.KLDivLoss`.

    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     loss = KLDiv(reduction="batchmean")
    >>> loss.at(torch.zeros(1, 2), torch.tensor([[0.5, 0.5]])).gradient()
    tensor([[-0.5000, -0.5000]])
    """

    reduction: KLReduction = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        warnings.warn(
            "KLDiv is linear in its input (log-probabilities), so its ggn is zero; use KLDivWithLogits on the logits, "
            "with log_softmax taken out of the model",
            CurvalgWarning,
            stacklevel=3,
        )

    @classmethod
    def from_module(cls, module: nn.KLDivLoss) -> KLDiv:
        """The loss with the options of a torch module."""
        return cls(log_target=module.log_target, reduction=module.reduction)  # type: ignore[arg-type]  # str in torch

    @property
    def facts(self) -> LossFacts:
        """Linear in the output, hence convex."""
        return LossFacts("KLDiv", convex=True)

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        """The sum of numerators, by torch."""
        return F.kl_div(output, target, reduction="sum", log_target=self.log_target)

    def first(self, output: Tensor, target: Tensor) -> Tensor:
        """The constant derivative −q."""
        return -(target.exp() if self.log_target else target)

    def second(self, output: Tensor, target: Tensor) -> Tensor:
        """Zero for every element."""
        return torch.zeros_like(output)

"""Regression losses of the residual r = z − t: squared error, Huber, smooth L1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvalg.errors import LossError
from curvalg.expr.facts import LossFacts
from curvalg.losses.closed_forms.elementwise import ElementwiseLoss
from curvalg.losses.loss import Reduction
from curvalg.losses.validation import check_reduction


@dataclass(frozen=True, kw_only=True)
class MSE(ElementwiseLoss):
    r"""Squared error: Σ (z − t)², B = 2 I; a mean divides by the number of elements.

    It is the likelihood of a normal distribution of variance 1/2 around z.

    Args:
        reduction: ``"mean"`` or ``"sum"``.

    Raises:
        LossError: if the reduction is unknown.

    Reference: :class:`torch.nn.MSELoss`.

    >>> MSE().at(torch.tensor([[3.0]]), torch.tensor([[1.0]])).gradient()
    tensor([[4.]])
    """

    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        check_reduction("MSE", self.reduction)

    @classmethod
    def from_module(cls, module: nn.MSELoss) -> MSE:
        """The loss with the options of a torch module."""
        return cls(reduction=module.reduction)  # type: ignore[arg-type]  # str in torch

    @property
    def facts(self) -> LossFacts:
        """Convex, and a likelihood."""
        return LossFacts("MSE", convex=True, likelihood=True, fisher_is_ggn=True)

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target, reduction="sum")

    def first(self, output: Tensor, target: Tensor) -> Tensor:
        """The derivative 2 r."""
        return 2 * (output - target)

    def second(self, output: Tensor, target: Tensor) -> Tensor:
        """Two for every element."""
        return torch.full_like(output, 2.0)


@dataclass(frozen=True, kw_only=True)
class Huber(ElementwiseLoss):
    r"""Huber loss: Σ r²/2 where |r| < δ, else δ (|r| − δ/2); B = 1[|r| < δ].

    Args:
        delta: δ > 0.
        reduction: ``"mean"`` or ``"sum"``.

    Raises:
        LossError: if an option is out of range.

    Reference: :class:`torch.nn.HuberLoss`.

    >>> Huber(delta=2.0).at(torch.tensor([[3.0, 1.0]]), torch.zeros(1, 2)).gradient()
    tensor([[2., 1.]])
    """

    delta: float = 1.0
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        check_reduction("Huber", self.reduction)
        if not self.delta > 0:
            raise LossError(f"Huber: expected delta > 0, got {self.delta}")

    @classmethod
    def from_module(cls, module: nn.HuberLoss) -> Huber:
        """The loss with the options of a torch module."""
        return cls(delta=module.delta, reduction=module.reduction)  # type: ignore[arg-type]  # str in torch

    @property
    def facts(self) -> LossFacts:
        """Convex, but no likelihood."""
        return LossFacts("Huber", convex=True)

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        """The sum of numerators, by torch."""
        return F.huber_loss(output, target, reduction="sum", delta=self.delta)

    def first(self, output: Tensor, target: Tensor) -> Tensor:
        """r, clipped to [−δ, δ]."""
        return (output - target).clamp(-self.delta, self.delta)

    def second(self, output: Tensor, target: Tensor) -> Tensor:
        """1 where |r| < δ."""
        return ((output - target).abs() < self.delta).to(output.dtype)


@dataclass(frozen=True, kw_only=True)
class SmoothL1(ElementwiseLoss):
    r"""Smooth L1 loss: Σ r²/(2β) where |r| < β, else |r| − β/2; B = 1[|r| < β]/β, and 0 for β = 0 (L1).

    Args:
        beta: β ≥ 0.
        reduction: ``"mean"`` or ``"sum"``.

    Raises:
        LossError: if an option is out of range.

    Reference: :class:`torch.nn.SmoothL1Loss`, :class:`torch.nn.L1Loss`.

    >>> SmoothL1(beta=2.0).at(torch.tensor([[3.0, 1.0]]), torch.zeros(1, 2)).gradient()
    tensor([[1.0000, 0.5000]])
    """

    beta: float = 1.0
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        check_reduction("SmoothL1", self.reduction)
        if not self.beta >= 0:
            raise LossError(f"SmoothL1: expected beta >= 0, got {self.beta}")

    @classmethod
    def from_module(cls, module: nn.SmoothL1Loss | nn.L1Loss) -> SmoothL1:
        """The loss with the options of a torch module; L1 is β = 0."""
        beta = module.beta if isinstance(module, nn.SmoothL1Loss) else 0.0
        return cls(beta=beta, reduction=module.reduction)  # type: ignore[arg-type]  # str in torch

    @property
    def facts(self) -> LossFacts:
        """Convex, but no likelihood."""
        return LossFacts("SmoothL1", convex=True)

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        """The sum of numerators, by torch."""
        return F.smooth_l1_loss(output, target, reduction="sum", beta=self.beta)

    def first(self, output: Tensor, target: Tensor) -> Tensor:
        """r/β, clipped to [−1, 1]; the sign of r for β = 0."""
        residual = output - target
        return residual.sign() if self.beta == 0 else (residual / self.beta).clamp(-1.0, 1.0)

    def second(self, output: Tensor, target: Tensor) -> Tensor:
        """1/β where |r| < β."""
        inside = ((output - target).abs() < self.beta).to(output.dtype)
        return inside if self.beta == 0 else inside / self.beta

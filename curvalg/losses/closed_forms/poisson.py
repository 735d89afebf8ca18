"""Poisson negative log-likelihood of counts, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvalg.errors import LossError
from curvalg.expr.facts import LossFacts
from curvalg.losses.closed_forms.elementwise import ElementwiseLoss
from curvalg.losses.loss import Reduction
from curvalg.losses.validation import check_range, check_reduction


@dataclass(frozen=True, kw_only=True)
class PoissonNLL(ElementwiseLoss):
    r"""Poisson likelihood: Σ e^z − t z for log-rates z, Σ z − t log(z + eps) for rates z.

    B = e^z for log-rates, equal to the Fisher matrix. For rates B = t/(z + eps)², and the Fisher matrix of counts of
    rate z is z/k² + (eps/k)² with k = z + eps. A mean divides by the number of elements.

    Args:
        log_input: whether the output holds log-rates.
        full: whether to add Stirling's approximation of log t! (no effect on derivatives).
        eps: guards the logarithm of rates.
        reduction: ``"mean"`` or ``"sum"``.

    Raises:
        LossError: if an option is out of range.

    Reference: :class:`torch.nn.PoissonNLLLoss`.

    >>> PoissonNLL().at(torch.zeros(1, 1), torch.tensor([[3.0]])).gradient()
    tensor([[-2.]])
    """

    log_input: bool = True
    full: bool = False
    eps: float = 1e-8
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        check_reduction("PoissonNLL", self.reduction)
        if not self.eps >= 0:
            raise LossError(f"PoissonNLL: expected eps >= 0, got {self.eps}")

    @classmethod
    def from_module(cls, module: nn.PoissonNLLLoss) -> PoissonNLL:
        """The loss with the options of a torch module."""
        reduction: Reduction = module.reduction  # type: ignore[assignment]  # str in torch
        return cls(log_input=module.log_input, full=module.full, eps=module.eps, reduction=reduction)

    @property
    def facts(self) -> LossFacts:
        """Convex, a likelihood; the Fisher matrix is the GGN for log-rates only."""
        return LossFacts("PoissonNLL", convex=True, likelihood=True, fisher_is_ggn=self.log_input)

    def check_values(self, output: Tensor, target: Tensor) -> None:
        """Counts are not negative; rates are not negative, and positive where nothing guards the logarithm."""
        check_range("PoissonNLL", target, target >= 0, "counts >= 0 as target")
        if not self.log_input:
            allowed = (output >= 0) & (output + self.eps > 0)
            check_range("PoissonNLL", output, allowed, "rates z >= 0 with z + eps > 0 as output (log_input=False)")

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        """The sum of numerators, by torch."""
        return F.poisson_nll_loss(
            output, target, log_input=self.log_input, full=self.full, eps=self.eps, reduction="sum"
        )

    def first(self, output: Tensor, target: Tensor) -> Tensor:
        """The derivative e^z − t, or 1 − t/k for rates."""
        return output.exp() - target if self.log_input else 1 - target / (output + self.eps)

    def second(self, output: Tensor, target: Tensor) -> Tensor:
        """The derivative e^z, or t/k² for rates."""
        return output.exp() if self.log_input else target / (output + self.eps).square()

    def information(self, output: Tensor, target: Tensor) -> Tensor:
        """The information e^z, or z/k² + (eps/k)² for rates."""
        if self.log_input:
            return output.exp()
        guarded = output + self.eps
        return output / guarded.square() + torch.square(self.eps / guarded)

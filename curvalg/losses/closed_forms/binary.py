"""Binary cross-entropy on logits, in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvalg.errors import LossError
from curvalg.expr.facts import LossFacts
from curvalg.losses.closed_forms.elementwise import ElementwiseLoss
from curvalg.losses.loss import Reduction, Structure
from curvalg.losses.validation import check_range, check_reduction, check_weight


@dataclass(frozen=True, kw_only=True, eq=False)
class BCEWithLogits(ElementwiseLoss):
    r"""Binary cross-entropy of σ(z): −Σ w (π t log σ(z) + (1 − t) log σ(−z)); B = w (1 + (π − 1) t) σ(z) σ(−z).

    α̂ = w; the factor of the positive weight π belongs to ℓ. A mean divides by the number of elements.

    Args:
        weight: w, broadcastable to the target; None is 1.
        pos_weight: π, broadcastable to the target along its last axes; None is 1.
        reduction: ``"mean"`` or ``"sum"``.

    Raises:
        LossError: if an option is out of range.

    Reference: :class:`torch.nn.BCEWithLogitsLoss`.

    >>> BCEWithLogits().at(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])).gradient()
    tensor([[-0.5000,  0.5000]])
    """

    weight: Tensor | None = None
    pos_weight: Tensor | None = None
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        check_reduction("BCEWithLogits", self.reduction)
        for option in ("weight", "pos_weight"):
            check_weight("BCEWithLogits", option, getattr(self, option))

    @classmethod
    def from_module(cls, module: nn.BCEWithLogitsLoss) -> BCEWithLogits:
        """The loss with the options of a torch module."""
        reduction: Reduction = module.reduction  # type: ignore[assignment]  # str in torch
        return cls(weight=module.weight, pos_weight=module.pos_weight, reduction=reduction)

    @property
    def facts(self) -> LossFacts:
        """Convex unless a weight is negative; a likelihood with the weights as sample weights."""
        convex = all(bool((tensor >= 0).all()) for tensor in self.tensors().values())
        return LossFacts("BCEWithLogits", convex=convex, likelihood=True, fisher_is_ggn=True)

    def tensors(self) -> dict[str, Tensor]:
        """The weights that are given."""
        named = {"weight": self.weight, "pos_weight": self.pos_weight}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def weights(self, target: Structure) -> Tensor:
        """The weight w of every element."""
        ones = super().weights(target)
        weight = self._broadcast("weight", self.weight, ones)
        return ones if weight is None else weight.expand(ones.shape)

    def check_values(self, output: Tensor, target: Tensor) -> None:
        """Targets lie in [0, 1], and the positive weights fit."""
        check_range("BCEWithLogits", target, (target >= 0) & (target <= 1), "targets in [0, 1]")
        self._broadcast("pos_weight", self.pos_weight, target)

    def total(self, output: Tensor, target: Tensor) -> Tensor:
        """The sum of numerators, by torch."""
        weight = self._broadcast("weight", self.weight, output, live=True)
        positive = self._broadcast("pos_weight", self.pos_weight, output, live=True)
        return F.binary_cross_entropy_with_logits(output, target, weight=weight, pos_weight=positive, reduction="sum")

    def first(self, output: Tensor, target: Tensor) -> Tensor:
        """(1 − t) σ(z) − π t σ(−z): no difference of nearly equal numbers for saturated logits."""
        return (1 - target) * output.sigmoid() - self._positive(target) * target * (-output).sigmoid()

    def second(self, output: Tensor, target: Tensor) -> Tensor:
        """(1 − t + π t) σ(z) σ(−z)."""
        return ((1 - target) + self._positive(target) * target) * output.sigmoid() * (-output).sigmoid()

    def _positive(self, target: Tensor) -> Tensor:
        positive = self._broadcast("pos_weight", self.pos_weight, target)
        return torch.ones_like(target) if positive is None else positive

    def _broadcast(self, option: str, weight: Tensor | None, like: Tensor, *, live: bool = False) -> Tensor | None:
        if weight is None:
            return None
        try:
            return (weight if live else weight.detach()).to(like).expand(like.shape)
        except RuntimeError:
            raise LossError(
                f"BCEWithLogits: expected {option} to broadcast to the target {tuple(like.shape)}, got "
                f"{tuple(weight.shape)}; one weight per row cannot follow a split into batches"
            ) from None

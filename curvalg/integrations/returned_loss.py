"""Losses that a model computes itself, so that its output is the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from curvalg.expr.facts import LossFacts
from curvalg.losses import Loss, LossPoint
from curvalg.losses.loss import Reduction, Structure
from curvalg.losses.validation import check_reduction, floating, real_target


@dataclass(frozen=True)
class ReturnedLoss(Loss):
    """The loss that a model returns for each batch, of shape (1,); the target holds the batch's number of rows, shape (1,).

    A mean is Σ_b n_b ℓ_b / Σ_b n_b over batches of n_b rows, a sum Σ_b ℓ_b. It is linear in the output, so B = 0.

    Args:
        model: the name of the model's class.
        single: whether every batch has one row, so that ℓ_b is the loss of a sample.
        reduction: ``"mean"`` or ``"sum"``, what ℓ_b is over the rows of its batch.

    Raises:
        LossError: an unknown reduction.
    """

    model: str
    single: bool
    reduction: Reduction

    def __post_init__(self) -> None:
        check_reduction(self.name, self.reduction)

    @property
    def name(self) -> str:
        """The name of the loss in messages."""
        return f"the loss that {self.model} returns"

    @property
    def facts(self) -> LossFacts:
        """There is no output beside the loss, and samples have losses only where they are batches."""
        return LossFacts(self.name, of_output=False, per_sample=self.single)

    def weights(self, target: Structure) -> Tensor:
        """n_b for a mean, 1 for a sum."""
        rows = real_target(self.name, target)
        return rows if self.reduction == "mean" else torch.ones_like(rows)

    def denominator(self, target: Structure) -> float:
        """The number of rows n_b."""
        return float(real_target(self.name, target).sum())

    def at(self, output: Structure, target: Structure) -> ReturnedLossPoint:
        """The loss at an output (1,)."""
        return ReturnedLossPoint(self, floating(self.name, output), self.weights(target))


class ReturnedLossPoint(LossPoint[Tensor]):
    """The loss that a model returned for one batch, with its weight."""

    labels = None

    def __init__(self, loss: ReturnedLoss, output: Tensor, weights: Tensor) -> None:
        self.facts, self.output, self.weights = loss.facts, output, weights.to(output)
        self.noise_shape = tuple(output.shape)

    def value(self) -> Tensor:
        """The weighted loss."""
        return self.weights @ self.output

    def gradient(self) -> Tensor:
        """The weight, whatever the output."""
        return self.weights

    def hvp(self, tangent: Tensor) -> Tensor:
        """Zero: the loss is the output."""
        return torch.zeros_like(tangent)

    def factor(self) -> Tensor:
        """Nothing: refused, as all that is made of B.

        Raises:
            LossError: always.
        """
        raise self.facts.without_output("this quantity")

    def pseudo_gradients(self, uniform: Tensor, *, fisher: bool = False) -> Tensor:
        """Nothing: refused, as all that is made of B.

        Raises:
            LossError: always.
        """
        raise self.facts.without_output("this quantity")

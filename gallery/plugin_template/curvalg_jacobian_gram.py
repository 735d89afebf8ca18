"""The Gram matrix of the outputs' Jacobian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from curvalg import Facts, LossFacts, OptionError, Term

if TYPE_CHECKING:  # lists of terms import this module, and need no torch
    from torch import Tensor

    from curvalg import Batch


@dataclass(frozen=True)
class JacobianGram(Term):
    """Gram matrix of the outputs' Jacobian, scale · Σₙ Jₙᵀ Jₙ (D × D): how much each direction moves the outputs.

    Args:
        scale: a factor ≥ 0.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise OptionError(
                f"jacobian_gram: scale must be a number ≥ 0, got {self.scale!r}"
            )

    def validate(self, loss: LossFacts | None) -> None:
        """Any loss will do, and none."""

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return Facts(psd=True)

    def cotangent_dot(self, batch: Batch, tangent: Tensor) -> Tensor:
        return self.scale * tangent

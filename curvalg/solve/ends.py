"""Ends of a spectrum: which eigenvalues are wanted, as ``scipy.sparse.linalg.eigsh`` names them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Which: TypeAlias = Literal["LA", "SA", "LM", "BE"]


@dataclass(frozen=True)
class Side:
    """One end of a list of ascending eigenvalues.

    Args:
        merit: a function of eigenvalues; those with the largest merit are wanted.
        count: how many.
        last: among equals, whether those at the end come first, so that the two ends do not meet before they must.
    """

    merit: Callable[[Tensor], Tensor]
    count: int
    last: bool

    def order(self, values: Tensor) -> Tensor:
        """Positions sorted by falling merit."""
        merits = self.merit(values)
        if not self.last:
            return merits.argsort(descending=True, stable=True)
        return len(values) - 1 - merits.flip(0).argsort(descending=True, stable=True)

    def best(self, values: Tensor) -> Tensor:
        """The merits that are wanted, falling."""
        return self.merit(values).sort(descending=True).values[: self.count]


SIDES: dict[str, Callable[[int], tuple[Side, ...]]] = {
    "LA": lambda k: (Side(torch.positive, k, True),),
    "SA": lambda k: (Side(torch.negative, k, False),),
    "LM": lambda k: (Side(torch.abs, k, True),),
    "BE": lambda k: (Side(torch.negative, k // 2, False), Side(torch.positive, k - k // 2, True)),
}
"""Largest, smallest, largest in magnitude, both ends (one more of the largest where k is odd)."""


def wanted(values: Tensor, which: Which, k: int) -> Tensor:
    """The positions (k,) of the wanted ones among ascending values, ascending; there must be at least k values."""
    return torch.cat([side.order(values)[: side.count] for side in SIDES[which](k)]).sort().values


def surpassed(old: Tensor, new: Tensor, which: Which, k: int, allowed: float) -> bool:
    """Whether, among new values, the wanted ones lie further out than the k old ones by more than ``allowed``."""
    return any(bool((side.best(new) > side.best(old) + allowed).any()) for side in SIDES[which](k))


def unrivalled(values: Tensor, errors: Tensor, which: Which, k: int) -> bool:
    """Whether no value beyond the wanted ones may, given its error, be one of them."""
    for side in SIDES[which](k):
        order, merits = side.order(values), side.merit(values)
        rivals = order[side.count :]
        if side.count and len(rivals) and bool((merits + errors)[rivals].max() > merits[order[side.count - 1]]):
            return False
    return True

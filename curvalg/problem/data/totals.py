"""Counts and denominators of a whole data set."""

from __future__ import annotations

from dataclasses import dataclass

from curvalg.losses import Loss


@dataclass(frozen=True)
class Totals:
    """Counts and denominators of a whole data set.

    Args:
        rows: number of rows, M of the data.
        count: N, the samples whose share is not identically zero.
        scale: s, N for a mean loss, 1 for a sum.
        denominator: what the loss of the whole data set divides by.
        loss: the loss with its reduction known.
    """

    rows: int
    count: int
    scale: float
    denominator: float
    loss: Loss | None

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
        misaligned: shape of an output whose rows are not the samples of its batch, and their number; None: there is none.
    """

    rows: int
    count: int
    scale: float
    denominator: float
    loss: Loss | None
    misaligned: tuple[tuple[int, ...], int] | None = None

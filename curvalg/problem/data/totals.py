"""Counts and denominators of a whole data set."""

from __future__ import annotations

from dataclasses import dataclass

from curvalg.losses import Loss
from curvalg.problem.data.batches import ReadBatch


@dataclass(frozen=True)
class Totals:
    """Counts and denominators of a whole data set.

    Args:
        rows: number of rows, M of the data.
        count: N, the samples whose share is not identically zero.
        scale: s, N for a mean loss, 1 for a sum.
        denominator: what the loss of the whole data set divides by.
        loss: the loss with its reduction known.
        rows_before, batches_before: of the data of the processes before this one.
        rows_here: of this process.
        most_batches: of any process.
        borrowed: a batch of another process, where this one has none but calls the model when the others do.
        misaligned: shape of an output whose rows are not the samples of its batch, and their number; None: there is none.
    """

    rows: int
    count: int
    scale: float
    denominator: float
    loss: Loss | None
    rows_before: int = 0
    batches_before: int = 0
    rows_here: int = -1
    most_batches: int = 0
    borrowed: ReadBatch | None = None
    misaligned: tuple[tuple[int, ...], int] | None = None

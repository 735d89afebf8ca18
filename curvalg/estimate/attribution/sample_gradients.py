"""Gradients of single samples of a problem, as the records of its layers, one batch of the data after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from curvalg.distributed.group import Group
from curvalg.problem import Problem, Snapshot
from curvalg.problem.layers.recorded import RecordedLayers, record_layers
from curvalg.problem.model.layer_record import LayerRecord
from curvalg.problem.verification.row_checks import warn_of_mixed_rows

WIDTH = 32
"""Columns that are taken through the network at a time."""


class SampleGradients:
    """The gradients of the samples of one batch.

    Args:
        recorded: the layers of the batch.
        start: number of its first sample in the data of this process.
        scale: what each gradient ∇cₙ of a share is multiplied by.

    Attributes:
        columns: the gradients by the outputs (samples of a row, rows, ...).
    """

    def __init__(self, recorded: RecordedLayers, start: int, scale: float) -> None:
        self._recorded, self.start = recorded, start
        self.columns = recorded.batch.gradient_columns(scale)

    @property
    def rows(self) -> int:
        """The rows of the batch."""
        return self.columns.shape[1]

    @property
    def each(self) -> int:
        """The samples of a row."""
        return self.columns.shape[0]

    @property
    def count(self) -> int:
        """The number of samples."""
        return self.rows * self.each

    def parts(self, width: int = WIDTH) -> Iterator[tuple[int, list[LayerRecord]]]:
        """The records of some samples of every row at a time, and the number of the first of them in its row."""
        for at in range(0, self.each, width):
            yield at, self._recorded.records(self.columns[at : at + width])


def in_order(found: list[Tensor]) -> Tensor:
    """Numbers of some samples of each row after the others, (P, K, n, ...), as those of all samples in order (P, N, ...)."""
    every = found[0] if len(found) == 1 else torch.cat(found, 1)
    return every.transpose(1, 2).flatten(1, 2)


def sample_gradients(problem: Problem, snapshot: Snapshot, scale: float = 1.0) -> Iterator[SampleGradients]:
    """Go over the data once; the samples of a row follow each other. Warns where rows of a batch depend on each other.

    Args:
        problem: with a loss.
        snapshot: the state.
        scale: what each gradient ∇cₙ of a share is multiplied by; s gives that of the sample's own loss.

    Raises:
        LossError: samples have no losses of their own.
        ProblemError: samples influence each other (batch-norm in training mode).
    """
    start = 0  # among the data of this process
    for evaluation in problem.evaluations(snapshot, order_matters=True):
        recorded = record_layers(evaluation)
        warn_of_mixed_rows(evaluation, recorded.z)
        found = SampleGradients(recorded, start, scale)
        yield found
        start += found.count


def samples_before(problem: Problem, snapshot: Snapshot) -> int:
    """The samples of the processes before this one; one pass over the data where a row has several."""
    group = problem.group
    if group.alone:
        return 0
    if problem.samples == "item":
        return problem.totals.rows_before
    here = 0
    with problem.differentiating():
        for evaluation in problem.evaluations(snapshot, order_matters=True):
            batch = evaluation.evaluate()
            here += len(batch.output) * batch.row_samples
    return sum(int(count) for (count,) in group.numbers(here)[: group.rank])


def first_records(problem: Problem, snapshot: Snapshot) -> list[LayerRecord] | None:
    """Records of some samples of the first batch; None where this process has no data."""
    for samples in sample_gradients(problem, snapshot):
        return next(records for _, records in samples.parts())
    return None


def shared_records(group: Group, own: Sequence[LayerRecord] | None) -> Sequence[LayerRecord]:
    """The same records on all processes: those of the first that has any."""
    found = [bool(has) for (has,) in group.numbers(float(own is not None))]
    shared: Sequence[LayerRecord] = group.of(found.index(True), own)
    return shared

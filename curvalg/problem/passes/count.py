"""The first pass over the data, which counts before anything else is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from tqdm.auto import tqdm

from curvalg.errors import LossError, ProblemError
from curvalg.losses import CallableLoss, Loss, infer_reduction
from curvalg.losses.additive import check_additive, check_additive_pair
from curvalg.losses.loss import Reduction
from curvalg.problem.data.batches import ReadBatch
from curvalg.problem.data.row_hashes import Fingerprint
from curvalg.problem.data.totals import Totals
from curvalg.problem.evaluation import Evaluation
from curvalg.problem.model.model import recording
from curvalg.problem.passes.copies_of_data import CopiesOfData
from curvalg.problem.passes.filling import borrow, filled_uncounted
from curvalg.problem.setting import Setting
from curvalg.tensors import trees


def count(problem: Setting) -> Totals:
    """Count by one pass over the data without the model; a callable loss is tried on every batch, with the model.

    Raises:
        ProblemError: every target is ignored.
        LossError: a callable does not add up over samples.
    """
    loss, rows, batches, calls, samples, denominator = problem.loss, 0, 0, 0, 0, 0.0
    last: ReadBatch | None = None
    judged: list[Any] = []
    misaligned: tuple[tuple[int, ...], int] | None = None
    copies = CopiesOfData(problem)
    called = problem.group.sharded and type(loss) is CallableLoss
    for sample in tqdm(
        filled_uncounted(problem) if called else problem.read(), "counting", disable=not problem.progress
    ):
        if sample.weightless:  # another process has one more batch to try the loss on
            with problem.differentiating():
                Evaluation(problem, problem.snapshot(), sample).output()
            continue
        copies.add(sample)
        if type(loss) is CallableLoss:  # subclasses know their denominators
            loss = _judge(problem, loss, sample, judged)
            z = trees.tensors(judged[0])[0]
            if len(z) != sample.rows:
                misaligned = tuple(z.shape), sample.rows
        rows += sample.rows
        batches, calls = sample.index + 1, calls + 1
        last = sample
        if loss is None:
            samples += sample.rows
            continue
        used = loss.weights(sample.target) != 0
        if problem.samples == "position" and loss.class_axis is None and used.ndim > 1:
            used = used.any(-1)  # a position is a vector
        each = used.reshape(used.shape[0], -1).any(1) if problem.samples == "item" else used
        samples += int(each.sum())
        denominator += float(loss.denominator(sample.target))
    contents = None if problem.group.alone else problem.data.sums()
    here = _Counted(
        rows, batches, calls, samples, denominator, None if loss is None else loss.reduction, misaligned, contents
    )
    copies.require_alike()
    return _totals(problem, loss, here, last)


def _totals(problem: Setting, loss: Loss | None, here: _Counted, last: ReadBatch | None) -> Totals:
    """The totals of all processes, from what each has counted, and its last batch, if it has one."""
    every = problem.group.objects(here)
    before = every[: problem.group.rank]
    if problem.compares:
        _require_parts(every)
    rows, samples = sum(c.rows for c in every), sum(c.samples for c in every)
    denominator = sum(c.denominator for c in every)
    loss = _of_all(loss, every)
    misaligned = next((c.misaligned for c in every if c.misaligned is not None), None)
    if not rows:
        raise ProblemError("the data of all processes are empty: there is no batch with a sample in it")
    mean = loss is not None and loss.reduction == "mean"
    if mean and not denominator:
        raise ProblemError("every target is ignored or has weight 0, so the mean loss has nothing to divide by")
    return Totals(
        rows,
        samples,
        float(samples) if mean else 1.0,
        denominator if mean else 1.0,
        loss,
        sum(c.rows for c in before),
        sum(c.batches for c in before),
        here.rows,
        max(c.calls for c in every),
        borrow(problem, last, [c.calls for c in every]) if problem.group.sharded else None,
        misaligned,
    )


@dataclass(frozen=True)
class _Counted:
    """What one process counted of its data."""

    rows: int
    batches: int
    calls: int
    samples: int
    denominator: float
    reduction: str | None
    misaligned: tuple[tuple[int, ...], int] | None
    contents: Fingerprint | None


def _require_parts(every: Sequence[_Counted]) -> None:
    """Raise where two processes have the same data, which would count twice.

    Raises:
        ProblemError: they do.
    """
    for rank, own in enumerate(every):
        for other in range(rank):
            if own.rows and own.contents is not None and own.contents == every[other].contents:
                raise ProblemError(
                    f"ranks {other} and {rank} have the same data, which would count twice: with group= each process has "
                    "a part of the batches. Pass data=curvalg.distributed.shard(dataset, batch_size=...), or leave group= out"
                )


def _of_all(loss: Loss | None, every: Sequence[_Counted]) -> Loss | None:
    """The loss, with the reduction that processes with data have found.

    Raises:
        LossError: they do not agree.
    """
    found = {c.reduction for c in every if c.rows and c.reduction is not None}
    if len(found) > 1:
        raise LossError(
            "the loss averages over rows on some processes and sums on others; say which, reduction='mean' or 'sum'"
        )
    if type(loss) is not CallableLoss or not found:
        return loss
    return dataclasses.replace(loss, reduction=cast("Reduction", found.pop()))


def _judge(problem: Setting, loss: CallableLoss, sample: ReadBatch, before: list[Any]) -> CallableLoss:
    """A callable with its reduction known, after trying whether it adds up within this batch and with the one before.

    Raises:
        LossError: it does not, so that no denominator would be right.
    """
    evaluation = Evaluation(problem, problem.snapshot(), sample)
    with problem.differentiating():
        z, form = evaluation.output()
    with torch.no_grad(), recording(problem.model):
        now = [form.split(z), sample.target]

        def judge() -> Reduction:
            reduction = cast("Reduction | None", loss.reduction) or infer_reduction(loss.fn, *now)
            check_additive(loss.fn, reduction, *now)
            if before:
                check_additive_pair(loss.fn, reduction, *before, *now)
            return reduction

        reduction = problem.draws.run(judge, sample.index)
    before[:] = now
    return dataclasses.replace(loss, reduction=reduction)

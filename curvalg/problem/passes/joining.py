"""Several processes that make one problem."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from curvalg.distributed.packing import packed
from curvalg.errors import GroupError, LossError, ProblemError
from curvalg.problem.data.batches import ReadBatch
from curvalg.problem.data.parts_of_data import require_shard
from curvalg.problem.evaluation import Evaluation
from curvalg.problem.setting import Setting
from curvalg.problem.verification.verdicts import rounding

ROWS = 2
"""Rows that are enough for a comparison."""

OPTIONS = ("samples", "factored", "accumulate", "autocast", "columns")
"""Options that decide which exchanges follow, or what they are of."""


def join(problem: Setting, loss: Any) -> None:
    """Make sure that all processes mean the same problem, each with a part of the data.

    Args:
        problem: of this process.
        loss: as the user gave it.

    Raises:
        GroupError: they do not; on all of them.
    """
    with problem.together("making a Problem"):
        problem.data.may_be_empty = True
        problem.progress = problem.progress and not problem.group.vectors.rank
        require_shard(problem.data)
        own = {
            "the parameters": [f"{name} {tuple(shape)}" for name, shape in problem.layout.whole.shapes.items()],
            "the precision": problem.dtype,
            "the loss": None
            if problem.loss is None
            else (problem.loss.name, problem.loss.reduction, type(loss).__name__),
            "whether the loader shuffles": not problem.data.ordered,
            **{f"{name}=": getattr(problem, name) for name in OPTIONS},
            "verify=": problem.compares,
            "randomness=": problem.draws.mode,
            "whether anything is kept (cache=)": problem.budget.limit > 0,
        }
        problem.group.vectors.agree(own, "make the Problem with the same model, loss and options on all ranks")


def compare(problem: Setting) -> None:
    """Raise where the processes that share a problem compute different numbers of the same rows.

    Equal weights do not make equal models: code, hooks, attributes and options of the loss count as well. The first rows of the
    first process with data go to all; with ``verify=False``, or draws that are replayed, nothing is compared.

    Raises:
        GroupError: the outputs differ, or the losses.
    """
    group = problem.group
    if group.alone or not problem.compares or problem.draws.mode == "frozen":
        return
    own = next(iter(problem.read()), None) if problem.totals.rows_here else None
    source = next(rank for rank, (here,) in enumerate(group.numbers(float(own is not None))) if here)
    sample = group.of(source, _portable(problem, own) if group.rank == source else None)
    if sample is None:
        return
    every = group.objects(_numbers(problem, sample))
    known = [(rank, found) for rank, found in enumerate(every) if found is not None]
    for rank, found in known:
        for what, (value, most, tolerance) in found.items():
            expected = known[0][1].get(what, (math.nan, 0.0, 0.0))
            if not abs(value - expected[0]) <= max(tolerance, expected[2]) * max(most, expected[1]):
                raise GroupError(
                    f"ranks {known[0][0]} and {rank} compute different {what} of the same rows: their weights are equal, but "
                    "the code, attributes, hooks or options of their models or losses are not. Make them alike on all ranks"
                )


def _portable(problem: Setting, sample: ReadBatch | None) -> ReadBatch | None:
    """The first rows of a batch, where they can go to another process."""
    assert sample is not None
    as_it_is = problem.model.batch_statistics or problem.group.sharded
    few = sample if as_it_is else sample.head(min(sample.rows, ROWS))
    try:
        packed(few)
    except Exception:  # whatever a batch is made of, and cannot be sent
        return None
    return replace(few, start=0, index=-1)  # of no batch of this process


def _numbers(problem: Setting, sample: ReadBatch) -> dict[str, tuple[float, float, float]] | None:
    """Sums over what model and loss give, with the sizes of their terms and the rounding that is allowed; None where they
    cannot be computed for so few rows."""
    evaluation = Evaluation(problem, problem.snapshot(), sample)
    try:
        with problem.differentiating():
            z, form = evaluation.output()
            batch = evaluation.batch(z, form)
            terms = {"outputs": z}
            if problem.loss is not None:
                terms |= {
                    "losses": torch.as_tensor(batch.value(), device=z.device),
                    "gradients of the loss": batch.loss_gradient,
                }
    except (ProblemError, LossError):
        if problem.group.sharded:  # in the middle of a call that all make
            raise
        return None
    allowed = rounding(evaluation, z)
    waves = {what: torch.cos(torch.arange(t.numel(), device=t.device)).to(t.dtype) for what, t in terms.items()}
    return {
        what: (float((t.reshape(-1) * waves[what]).sum()), float(t.abs().sum()), allowed) for what, t in terms.items()
    }

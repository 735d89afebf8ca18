"""The first pass over the data, which counts before anything else is computed."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from tqdm.auto import tqdm

from curvalg.errors import ProblemError
from curvalg.losses import CallableLoss, infer_reduction
from curvalg.losses.additive import check_additive, check_additive_pair
from curvalg.losses.loss import Reduction
from curvalg.problem.data.batches import ReadBatch
from curvalg.problem.data.totals import Totals
from curvalg.problem.evaluation import Evaluation
from curvalg.problem.model.model import recording
from curvalg.problem.setting import Setting
from curvalg.tensors import trees


def count(problem: Setting) -> Totals:
    """Count by one pass over the data without the model; a callable loss is tried on every batch, with the model.

    Raises:
        ProblemError: every target is ignored.
        LossError: a callable does not add up over samples.
    """
    loss, rows, samples, denominator = problem.loss, 0, 0, 0.0
    before: list[Any] = []
    misaligned: tuple[tuple[int, ...], int] | None = None
    for sample in tqdm(problem.read(), "counting", disable=not problem.progress):
        if type(loss) is CallableLoss:  # subclasses know their denominators
            loss = _judge(problem, loss, sample, before)
            z = trees.tensors(before[0])[0]
            if len(z) != sample.rows:
                misaligned = tuple(z.shape), sample.rows
        rows += sample.rows
        if loss is None:
            samples += sample.rows
            continue
        used = loss.weights(sample.target) != 0
        if problem.samples == "position" and loss.class_axis is None and used.ndim > 1:
            used = used.any(-1)  # a position is a vector
        each = used.reshape(used.shape[0], -1).any(1) if problem.samples == "item" else used
        samples += int(each.sum())
        denominator += float(loss.denominator(sample.target))
    mean = loss is not None and loss.reduction == "mean"
    if mean and not denominator:
        raise ProblemError("every target is ignored or has weight 0, so the mean loss has nothing to divide by")
    scale = float(samples) if mean else 1.0
    return Totals(rows, samples, scale, denominator if mean else 1.0, loss, misaligned)


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

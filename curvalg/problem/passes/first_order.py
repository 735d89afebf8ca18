"""The loss of a batch and gradients Jᵀu of it, chunk by chunk where its outputs are large."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from curvalg.errors import ProblemError
from curvalg.problem.batch import Batch
from curvalg.problem.evaluation import Evaluation
from curvalg.problem.large_outputs.find_head import record_head
from curvalg.problem.setting import Setting
from curvalg.tensors.backward import backward

T = TypeVar("T")


def loss_of(evaluation: Evaluation) -> float:
    """The loss of a batch, not yet divided by the denominator."""
    with torch.no_grad():
        if (found := record_head(evaluation, graph=False, once=True)) is not None:
            return sum(float(batch.value()) for _, batch in found[0].batches())
        z, form = evaluation.output()
        value = float(evaluation.loss_point(form.split(z), evaluation.sample).value())
        return 0.0 if evaluation.sample.weightless else value


def pulled(evaluation: Evaluation, cotangent_of: Callable[[Batch], Tensor]) -> Tensor:
    """Compute Jᵀu for u = cotangent_of(batch), shape (D,), by one model call, in chunks of positions for large outputs."""
    if (found := record_head(evaluation, once=True)) is None:
        z, leaves, form = evaluation.record(once=True)
        return evaluation.gather(backward([z], leaves, [cotangent_of(evaluation.batch(z, form))]))
    head, leaves = found
    problem = evaluation.problem
    total = torch.zeros(problem.size, dtype=problem.dtype, device=problem.device)
    cotangent = head.pull(cotangent_of, total)
    if head.hidden.requires_grad:
        gradients = backward([head.hidden], leaves, [cotangent])
        problem.layout.add_(total[None], [g if g is None else g[None] for g in gradients])
    return total


def gradient_over(problem: Setting, evaluations: Iterable[Evaluation]) -> Tensor:
    """The gradient of the loss of all data, shape (D,), over the evaluations of the batches of this process."""
    total = problem.sum()
    for evaluation in evaluations:
        total.add(pulled(evaluation, lambda batch: batch.loss_gradient))
    result: Tensor = problem.totalled({"gradient": total})["gradient"]
    return result


def finite(result: T, found: bool, what: str) -> T:
    """The result, if it was found to be finite.

    Raises:
        ProblemError: it is not.
    """
    if not found:
        raise ProblemError(
            f"the {what} of the loss is not finite (NaN or infinite); look for targets, weights or outputs that are not finite"
        )
    return result


def gradient_rows(problem: Setting, evaluations: Iterable[Evaluation]) -> Tensor:
    """The gradients s ∇cₙ of the samples' own losses, (N, D), over the evaluations of the batches of this process.

    Raises:
        LossError: samples have no losses of their own.
        ProblemError: samples influence each other, or each process has a part of the parameters.
    """
    if problem.group.sharded:
        raise ProblemError(
            "per_sample_gradients() gives whole rows, but each process has a part of the parameters here; make the "
            "Problem of a whole model on every process"
        )
    scale, found = problem.totals.scale, []
    for evaluation in evaluations:
        gradients = evaluation.evaluate().per_sample_gradients()
        shapes = problem.layout.shapes
        rows = [gradients[name].reshape(len(gradients[name]), shape.numel()) for name, shape in shapes.items()]
        found.append(scale * torch.cat(rows, 1).to(problem.dtype))
    return problem.group.rows(torch.cat(found) if found else None)

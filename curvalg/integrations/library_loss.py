"""Whether a task has the loss that a model returns itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from curvalg.errors import CurvalgError, ProblemError
from curvalg.integrations.adapters import ModelKeywords, base_of, inputs_of, labels_of, logits_of, loss_of
from curvalg.integrations.tasks import TASKS, Task

ROUNDING = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The relative error by which the loss of a half-precision model may differ; of others 1e-4."""


def require_same_loss(model: nn.Module, call: ModelKeywords, batch: Mapping[str, Any], task: Task) -> None:
    """Compare the loss of a task with what the model returns, by one call on one batch.

    Raises:
        ProblemError: they differ.
    """
    if "labels" not in call.accepted:
        return
    config = base_of(model).config
    before = getattr(config, "problem_type", None)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    labelled = {**inputs_of(batch), "labels": labels_of(batch)}
    with torch.no_grad(), torch.random.fork_rng():
        output = functional_call(_Called(model, call), {f"model.{n}": b for n, b in buffers.items()}, (labelled,))
    if before is None and getattr(config, "problem_type", None) is not None:
        config.problem_type = None  # the library notes there what it found
    if (theirs := loss_of(output)) is None:
        return
    logits = output[1] if isinstance(output, tuple) else logits_of(output)
    tolerance = ROUNDING.get(logits.dtype, 1e-4)
    ours = {name: _value(other, config, logits, labelled["labels"]) for name, other in TASKS.items()}
    if math.isclose(ours[task.name], float(theirs), rel_tol=tolerance, abs_tol=tolerance) or not torch.isfinite(theirs):
        return
    same = [name for name, value in ours.items() if math.isclose(value, float(theirs), rel_tol=tolerance)]
    cure = f"task={same[0]!r}, which gives that value, or " if same else ""
    raise ProblemError(
        f"{type(base_of(model)).__name__} returns the loss {float(theirs):.6g} on the first batch, and {task.name} makes it "
        f"{ours[task.name]:.6g}: it has terms of its own, such as those of routers, or counts otherwise. Pass "
        f"{cure}loss='model'"
    )


class _Called(nn.Module):
    """A model with one argument, the inputs by name."""

    def __init__(self, model: nn.Module, call: ModelKeywords) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, inputs: Mapping[str, Any]) -> Any:
        return self.call(self.model, inputs)


def _value(task: Task, config: Any, logits: Tensor, labels: Tensor) -> float:
    """The mean loss of a task at logits and labels; NaN where they do not fit it."""
    try:
        loss, rule = task.make(config, labels, "mean")
        target = rule(labels)
        return float(loss.at(logits, target).value()) / float(loss.denominator(target))
    except (CurvalgError, RuntimeError, IndexError, AttributeError, ZeroDivisionError):
        return math.nan

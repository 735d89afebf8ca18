"""Whether a task has the loss that a model returns itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from curvalg.errors import CurvalgError, ProblemError
from curvalg.integrations.adapters import Logits, ModelKeywords, base_of, inputs_of, labels_of, logits_of, loss_of
from curvalg.integrations.tasks import TASKS, Task

ROUNDING = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The relative error by which the loss of a half-precision model may differ; of others 1e-4."""


def require_same_loss(model: nn.Module, call: ModelKeywords, batch: Mapping[str, Any], task: Task) -> None:
    """Compare the loss of a task with what the model returns for one batch, by a call with its labels.

    Decoders are called once more, without labels, to see that they get the same inputs. Nothing is compared where the model
    takes no labels, returns no loss, or one that is not finite.

    Raises:
        ProblemError: they differ.
    """
    if "labels" not in call.accepted:
        return
    config, labels = base_of(model).config, labels_of(batch)
    before = getattr(config, "problem_type", None)
    output = _without_traces(model, lambda live: call(live, {**inputs_of(batch), "labels": labels}))
    if before is None and getattr(config, "problem_type", None) is not None:
        config.problem_type = None  # the library notes there what it found
    if (theirs := loss_of(output)) is None or not bool(torch.isfinite(theirs)):
        return
    logits = output[1] if isinstance(output, tuple) else logits_of(output)
    if task.decoder:
        logits = _without_traces(model, lambda live: Logits(call, decoder=True)(live, batch))
    value, tolerance = float(theirs), ROUNDING.get(logits.dtype, 1e-4)
    ours = _value(task, config, logits, labels)
    if _same(ours, value, tolerance):
        return
    others = (name for name, other in TASKS.items() if _same(_value(other, config, logits, labels), value, tolerance))
    cure = "".join(f"task={name!r}, which gives that value, or " for name in islice(others, 1))
    raise ProblemError(
        f"{type(base_of(model)).__name__} returns the loss {value:.6g} on the first batch, and {task.name} makes it "
        f"{ours:.6g}: it has terms of its own, such as those of routers, or counts otherwise. Pass {cure}loss='model'"
    )


class _Called(nn.Module):
    """Holds a model, so that a function of it sees exchanged buffers."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self) -> Any:
        return self.function(self.model)


def _without_traces(model: nn.Module, function: Callable[[nn.Module], Any]) -> Any:
    """The result of a function of the model, which leaves its buffers and the state of random numbers as they are."""
    buffers = {f"model.{name}": buffer.clone() for name, buffer in model.named_buffers(remove_duplicate=False)}
    with torch.no_grad(), torch.random.fork_rng():
        return functional_call(_Called(model, function), buffers, (), tie_weights=False)


def _same(ours: float, theirs: float, tolerance: float) -> bool:
    return math.isclose(ours, theirs, rel_tol=tolerance, abs_tol=tolerance)


def _value(task: Task, config: Any, logits: Tensor, labels: Tensor) -> float:
    """The mean loss of a task at logits and labels; NaN where they do not fit it."""
    try:
        loss, rule = task.make(config, labels, "mean")
        target = rule(labels)
        return float(loss.at(logits, target).value()) / float(loss.denominator(target))
    except (CurvalgError, RuntimeError, IndexError, AttributeError, ZeroDivisionError):
        return math.nan

"""Plans beside what processes count."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from curvalg import Problem, parse
from tests.support.sharded_models import cut, made, vector


def counted(op: Any, v: Tensor) -> dict[str, tuple[int, int]]:
    """(calls, bytes) of a product by kind, once whatever is tried at first is over."""
    group = op.problem.group
    for _ in range(3):
        op @ v
    before, traffic = (group.headers, group.payloads, group.bytes), copy.deepcopy(getattr(group, "traffic", None))
    op @ v
    frames = group.headers - before[0]
    found = {"frame": (frames, frames * group.size * 32 * 8)}
    if traffic is None:
        return found | {"all-reduce": (group.payloads - before[1], group.bytes - before[2])}
    for name, attribute in (("gather", "gathers"), ("reduce-scatter", "reduce_scatters")):
        old, new = getattr(traffic, attribute), getattr(group.traffic, attribute)
        found[name] = new.calls - old.calls, new.bytes - old.bytes
    return found


def _pair(op: Any, v: Tensor, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    columns = v.shape[1] if v.ndim > 1 else 1
    planned = op.plan(op.problem.group.size, columns=columns, **options).traffic
    return counted(op, v), {kind: (t.calls, t.bytes) for kind, t in planned.items()}


def in_parts(group: Any, kind: str, model: str, texts: list[str], columns: int = 1) -> dict[str, Any]:
    """What products of a model in parts exchange: counted, and planned by it, and by the whole model."""
    problem, whole, index = cut(group, kind, model)
    v = vector(whole.size)[index]
    v = v if columns == 1 else torch.stack([v] * columns, 1)
    return {text: _pair(parse(text).lower(problem), v) for text in texts}


def with_whole_parameters(group: Any, model: str, texts: list[str], columns: int = 1) -> dict[str, Any]:
    """What products exchange where every process has the whole model: counted and planned."""
    from tests.support.sharded_models import _numbers

    torch.set_default_dtype(torch.float64)
    batches = _numbers(model)
    own = batches[group.rank() :: group.size()] if len(batches) >= group.size() else batches[:1] * (group.rank() == 0)
    problem = Problem(made(model), nn.CrossEntropyLoss(), own, group=group)
    v = vector(problem.size) if columns == 1 else torch.stack([vector(problem.size)] * columns, 1)
    return {text: _pair(parse(text).lower(problem), v) for text in texts}


def held(group: Any) -> tuple[int, int]:
    """Numbers of the chosen parameters on this process, and the bytes that a plan says for it."""
    problem, _, _ = cut(group, "data", "mlp")
    own = sum(t.untyped_storage().nbytes() for t in problem.model.chosen.values())
    return own, parse("hessian").lower(problem).plan(problem.group.size).memory.parameters

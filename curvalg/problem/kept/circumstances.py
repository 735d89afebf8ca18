"""What measured choices depend on."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from curvalg.tensors import trees


def circumstances(setting: Any, rows: int, loss: object) -> tuple[Hashable, ...]:
    """What measured choices depend on besides the model and what their names say: values alone, which hold no model.

    Args:
        setting: model, data and options.
        rows: of the whole data set.
        loss: with its reduction known, or None.
    """
    source, rule = setting.data.source, setting.model.rule
    first = source[0] if isinstance(source, (list, tuple)) and source else ()
    shapes = tuple(tuple(t.shape) for t in trees.tensors(first))
    data = (type(source).__name__, shapes, getattr(source, "batch_size", None), setting.data.ordered, rows)
    forward = (getattr(rule, "__qualname__", type(rule).__name__), getattr(setting.model.given, "training", None))
    options = (
        setting.samples,
        setting.factored,
        setting.accumulate,
        setting.autocast,
        setting.compiler,
        setting.capture,
        setting.verify,
    )
    memory = setting.budget.limit if setting.budget.free is None else "auto"
    place = (str(setting.device), tuple(setting.layout.dtypes.values()), setting.size, torch.get_num_threads())
    return *data, *forward, *options, memory, setting.draws.mode, type(loss).__name__, *place

"""Inner products with gradients that are multiplied out: one matrix product with many directions, some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from curvalg.problem.model.layer_record import LayerRecord, steps

GAIN = 2
"""How many times fewer multiplications it has to take, since the gradients are written and read once more."""
SHARE = 4
"""Rows are taken by this share of what intermediate results may take: larger stacks of gradients leave the caches."""


def is_cheaper(pushed: float, multiplied_out: float) -> bool:
    """Whether to multiply gradients out, rather than to push every direction through the layer, given the multiplications."""
    return GAIN * multiplied_out < pushed


def project_explicit(record: LayerRecord, count: int, directions: Mapping[str, Tensor]) -> Tensor:
    """Inner products ⟨gₖₙ, vₚ⟩ of gradients that are made for some rows at a time, shape (P, K, n).

    Args:
        record: of the gradients.
        count: P.
        directions: name -> (P, *parameter.shape), of parameters of the record, one at least.
    """
    columns, rows = record.columns, record.rows
    flat = {name: v.reshape(count, -1) for name, v in directions.items()}
    size = sum(math.prod(record.shapes[name]) for name in record.params)
    like = next(iter(flat.values()))
    result = like.new_empty(count, columns, rows)
    for some in steps(rows, SHARE * columns * size, like.dtype):
        gradients = record.explicit(some)
        first, *others = (v @ gradients[name].reshape(-1, v.shape[1]).T for name, v in flat.items())
        for part in others:
            first += part
        result[:, :, some] = first.unflatten(1, (columns, -1))
    return result

"""Units of an operator, compared once with products of the operator itself before they are believed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvalg.estimate.attribution.units.parameter_unit import ParameterUnit, selected
from curvalg.estimate.attribution.units.units import Rotates, Units, units_of, whole
from curvalg.expr import Inverse
from curvalg.lowering import CurvatureOperator
from curvalg.problem.model.layer_record import LayerRecord
from curvalg.tensors.random_numbers import normals

ROUNDING = 1e3
"""How many units of rounding the two may differ by, relative to the norms of the vectors that are multiplied."""
FEW = 4
"""Gradients whose combination is multiplied by the operator."""


def checked_units(op: CurvatureOperator, records: Sequence[LayerRecord], rotates: Rotates) -> Units:
    """The units of the blocks of an operator, or all parameters as one where these are not right, or there are none.

    The scores of a random combination of a few gradients, with all gradients of the records, are compared unit by unit with
    those by a product of the operator, which has its own checks. Not with ``verify=False``, nor with ``check=False`` of its
    inverses.

    Args:
        op: on all parameters.
        records: of the layers, on any batch.
        rotates: decides between coordinates where both are possible.
    """
    return checked_blocks(op, records, rotates) or whole(op)


def checked_blocks(op: CurvatureOperator, records: Sequence[LayerRecord], rotates: Rotates) -> Units | None:
    """The units of the blocks of an operator; None where these are not right, or there are none.

    Args:
        op, records, rotates: as of :func:`checked_units`.
    """
    units = units_of(op, records, rotates)
    if units is None or not _is_checked(op):
        return units
    return units if op.problem.group.every(_agree(op, units, records)) else None


def _is_checked(op: CurvatureOperator) -> bool:
    return op.problem.verify and all(node.check for node in op.expr.walk() if isinstance(node, Inverse))


def _agree(op: CurvatureOperator, units: Units, records: Sequence[LayerRecord]) -> bool:
    problem, first = op.problem, records[0]
    few = slice(0, min(FEW, first.rows))
    weights = normals((few.stop * first.columns, 1), 0).to(problem.device, problem.dtype)
    own = weights.reshape(few.stop, first.columns).T
    mixing = weights.new_zeros(1, first.columns, first.rows)
    mixing[0, :, few] = own
    combined = {name: value for record in records for name, value in record.combine(mixing).items()}
    product = op._apply(problem.layout.flatten({name: value[0] for name, value in combined.items()})[:, None])
    directions = problem.layout.unflatten_rows(product.T.contiguous())
    return all(_agrees(unit, records, few, weights, directions) for unit in units)


def _agrees(
    unit: ParameterUnit[Any], records: Sequence[LayerRecord], few: slice, weights: Tensor, directions: dict[str, Tensor]
) -> bool:
    view = unit.view(records)
    scores = unit.project(view, unit.multiply(unit.gather(view, few)))
    found = torch.stack([torch.tensordot(weights[:, 0], s, 1) for s in scores.values()]).sum(0)
    mine = selected(records, unit.names)
    expected = torch.stack([record.project(directions)[0] for record in mine]).sum(0)
    norms = torch.stack([record.square_norms() for record in mine]).sum(0).sqrt()
    size = torch.stack([directions[name].norm() for name in unit.names]).norm()
    precision = torch.finfo(expected.dtype)
    # Squares of smaller norms, as of samples that were learnt by heart, are zero.
    allowed = ROUNDING * precision.eps * size * norms.clamp(min=precision.tiny**0.5)
    return bool(((found - expected).abs() <= allowed).all())

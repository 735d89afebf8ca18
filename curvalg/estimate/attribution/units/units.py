"""The units that an operator acts on by itself: its blocks where it has a structure, else all parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from curvalg.estimate.attribution.units.eigen_unit import LayerSizes, eigen_unit
from curvalg.estimate.attribution.units.parameter_unit import FlatUnit, ParameterUnit, selected
from curvalg.expr.term import NamedExpr
from curvalg.lowering import CurvatureOperator
from curvalg.lowering.blocks.rows import RowRanges
from curvalg.lowering.matrices import Blocks, Inverted, Structure
from curvalg.problem import Layout
from curvalg.problem.model.layer_record import LayerRecord

Units = list[ParameterUnit[Any]]
Rotates = Callable[[LayerSizes], bool]
"""Whether to change inputs and deltas of a layer of such sizes, rather than gradients, into the eigenbasis."""


class WholeUnit(FlatUnit):
    """All parameters as one unit, with the operator's own products and solves."""


def whole(op: CurvatureOperator, apply: Callable[[Tensor], Tensor] | None = None) -> Units:
    """All parameters as one unit, with the operator's own products and solves.

    Args:
        op: on all parameters.
        apply: how its products are taken, where that is another way.
    """
    return [WholeUnit(op.problem.layout.shapes, apply or op._apply)]


def is_whole(units: Sequence[Any]) -> bool:
    """Whether units are all parameters as one, whose products all processes of the operator take together."""
    return isinstance(units[0], WholeUnit)


def units_of(op: CurvatureOperator, records: Sequence[LayerRecord], rotates: Rotates) -> Units | None:
    """The units of the blocks of an operator; None where it is not made of arrays alone, or these have no structure.

    Args:
        op: on all parameters.
        records: of the layers, on any batch.
        rotates: decides where both are possible.
    """
    op.prepare()
    if any(isinstance(node, NamedExpr) for node in op._resolved.walk()):
        return None
    form = op._form()
    if form is None or form.rows:
        return None
    with op.problem.lock:
        structure = form.at(op.snapshot)
    return [_unit(places, block, op.problem.layout, records, rotates) for places, block in _blocks(structure)]


def _blocks(structure: Structure) -> Iterator[tuple[RowRanges, Structure]]:
    """The blocks of a block-diagonal structure or of its inverse, else the structure itself."""
    inverted = isinstance(structure, Inverted)
    outer = structure.inverted if isinstance(structure, Inverted) else structure
    if not isinstance(outer, Blocks):
        yield RowRanges((slice(0, structure.size),)), structure
        return
    for places, block in outer.parts:
        yield places, Inverted(block) if inverted else block


def _unit(
    places: RowRanges, block: Structure, layout: Layout, records: Sequence[LayerRecord], rotates: Rotates
) -> ParameterUnit[Any]:
    inside = [name for at in places.ranges for name in layout.names if _within(layout.slices[name], at)]
    mine = selected(records, inside)
    if len(mine) == 1 and (found := eigen_unit(mine[0], block, places)) is not None and rotates(found[1]):
        return found[0]
    own, start = [], 0
    for at in places.ranges:
        own.append(slice(start, start := start + at.stop - at.start))
    local = RowRanges(tuple(own), places.outputs)

    def apply(x: Tensor) -> Tensor:
        result = torch.empty_like(x)
        local.put(result, block.multiply(local.take(x)))
        return result

    return FlatUnit({name: layout.shapes[name] for name in inside}, apply)


def _within(part: slice, whole: slice) -> bool:
    return bool(whole.start <= part.start and part.stop <= whole.stop)

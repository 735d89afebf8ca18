"""The record of a layer, made from uses of its parameters and the gradients at their outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvalg.problem.layers.kinds.affine import AffineLayer
from curvalg.problem.layers.kinds.embedding import Embedding
from curvalg.problem.layers.kinds.maps import LinearMap
from curvalg.problem.layers.kinds.scaling import ElementwiseLayer, Shift
from curvalg.problem.layers.origin import Origin
from curvalg.problem.layers.uses import Declined, Use, joined
from curvalg.problem.model.layer_record import GuardedInput, LayerRecord, ParameterGroup


@dataclass(frozen=True)
class Portion:
    """What came from a parameter in one way and is used in one way, in all its uses.

    Args:
        origin: how it came from the parameter.
        form: a key that is equal for uses that can be put together as positions of one layer.
    """

    origin: Origin
    form: Any


def portions(name: str, uses: Sequence[Use]) -> dict[Portion, list[int]]:
    """The portions of a parameter, with the numbers of their uses."""
    found: dict[Portion, list[int]] = {}
    for i, use in enumerate(uses):
        for role, origin in use.roles.items():
            if origin.name == name:
                # A bias is a shift, whatever it is added to.
                found.setdefault(Portion(origin, (use.kind, use.form) if role == "weight" else ("shift",)), []).append(
                    i
                )
    return found


def build(
    place: ParameterGroup,
    members: Mapping[str, Portion],
    uses: Sequence[Use],
    gradients: Sequence[Tensor],
    rows: int,
    dtype: torch.dtype,
    inputs: Callable[[], GuardedInput | LinearMap],
) -> LayerRecord:
    """The record of portions that have all their uses in common.

    Args:
        place: of the portions.
        members: the portions, by the names that they have in the place.
        uses: of each of them.
        gradients: with respect to the outputs of the uses, (K, *output.shape).
        rows: n.
        dtype: to compute in.
        inputs: makes h of all uses.

    Raises:
        Declined: a tensor does not have the rows of the batch on its first axis.
    """
    of_origin = {origin: role for role, origin in uses[0].roles.items()}
    roles = {of_origin[portion.origin]: name for name, portion in members.items()}
    weight, bias = roles.get("weight"), roles.get("bias")
    if len(roles) < len(members):
        raise Declined("several parameters play the same part in a layer")

    def deltas(of: Callable[[Use, Tensor], Tensor]) -> Tensor:
        return joined([of(use, g.to(dtype)) for use, g in zip(uses, gradients, strict=True)], -2)

    if weight is None:
        return Shift(place, deltas(lambda use, g: use.shifts(g, rows)))
    h, d = inputs(), deltas(lambda use, g: use.deltas(g, rows))
    place = replace(place, real=real_positions(uses, d))
    make = _MAKERS[uses[0].kind]
    return make(place, weight, bias, h, d)


def real_positions(uses: Sequence[Use], deltas: Tensor) -> Tensor | None:
    """Which positions (n, T) are inputs, where some only fill up rows that have fewer; None: all.

    Args:
        uses: whose positions lie one after the other.
        deltas: of all (..., n, T, out).
    """
    routings = [use.routing for use in uses]
    if all(routing is None for routing in routings):
        return None
    rows, positions, _ = deltas.shape[-3:]
    plain = positions - sum(r.width for r in routings if r is not None)
    each = plain // max(1, sum(r is None for r in routings))
    parts = [torch.ones(rows, each, dtype=torch.bool, device=deltas.device) if r is None else r.real for r in routings]
    return torch.cat(parts, 1)


_MAKERS: dict[str, Callable[[ParameterGroup, str, str | None, Any, Tensor], LayerRecord]] = {
    "dense": AffineLayer,
    "scale": ElementwiseLayer,
    "embedding": lambda place, weight, bias, h, d: Embedding(place, h, d),
}

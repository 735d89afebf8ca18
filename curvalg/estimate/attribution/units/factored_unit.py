"""Parameters on which a matrix acts by itself, of whose products with gradients low-rank factors alone are held."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from curvalg.estimate.attribution.units.layer_parts import HeldProducts, LayerPart, layer_part
from curvalg.estimate.attribution.units.parameter_unit import ParameterUnit, Scores, by_layer, selected
from curvalg.problem.model.layer_record import LayerRecord

AT_A_TIME = 2**23
"""Bytes of products that exist as a whole at a time."""
WIDEST = 8
"""Bytes of a number, at most."""


@dataclass(frozen=True)
class FactoredView:
    """Gradients of a batch for the parameters of a unit.

    Args:
        unit: that multiplies them.
        records: of the batch.
    """

    unit: ParameterUnit[Any]
    records: Sequence[LayerRecord]

    @cached_property
    def whole(self) -> Any:
        """What the unit sees of them."""
        return self.unit.view(self.records)

    @cached_property
    def parts(self) -> list[LayerPart[Any]]:
        """The layers of the unit."""
        return [layer_part(record) for record in selected(self.records, self.unit.names)]


@dataclass(frozen=True)
class FactoredProducts:
    """Products of a matrix with some gradients, layer by layer.

    Args:
        layers: name of a layer, and what is held of its products.
    """

    layers: list[tuple[str, HeldProducts]]

    def and_(self, other: FactoredProducts) -> FactoredProducts:
        """These and others."""
        pairs = zip(self.layers, other.layers, strict=True)
        return FactoredProducts([(name, mine.and_(its)) for (name, mine), (_, its) in pairs])


class FactoredUnit:
    """A unit whose products are held layer by layer, weights as factors of some rank; gradients are multiplied at once.

    Args:
        unit: of which the products are.
        rank: of the factors.
    """

    def __init__(self, unit: ParameterUnit[Any], rank: int) -> None:
        self._unit, self._rank = unit, rank

    def view(self, records: Sequence[LayerRecord]) -> FactoredView:
        """What all of the following see of the gradients of a batch."""
        return FactoredView(self._unit, records)

    def gather(self, view: FactoredView, rows: slice) -> FactoredProducts:
        """The products with the gradients of all samples of some rows."""
        found: FactoredProducts | None = None
        width = max(1, AT_A_TIME // (WIDEST * self._unit.size * view.records[0].columns))
        for at in range(rows.start, rows.stop, width):
            gradients = self._unit.gather(view.whole, slice(at, min(at + width, rows.stop)))
            held = self._unit.hold(self._unit.multiply(gradients), view.parts, self._rank)
            piece = FactoredProducts([(part.name, own) for part, own in zip(view.parts, held, strict=True)])
            found = piece if found is None else found.and_(piece)
        assert found is not None
        return found

    def multiply(self, products: FactoredProducts) -> FactoredProducts:
        """The products, which gradients were made to when they were gathered."""
        return products

    def project(self, view: FactoredView, products: FactoredProducts, positions: bool = False) -> Scores:
        """Inner products with all gradients of a batch, by layer; or the shares of positions in these, (P, K, n, T)."""
        pairs = zip(view.parts, products.layers, strict=True)
        return by_layer((part.name, part.project(held, positions)) for part, (_, held) in pairs)

    def discarded(self, products: FactoredProducts) -> Scores:
        """Norms of what is missing of the products, by the names of the layers of which something may be (P,)."""
        pairs = [(name, held.discarded) for name, held in products.layers]
        return root_sums([(name, norms) for name, norms in pairs if norms is not None])

    def norms(self, view: FactoredView, positions: bool) -> Scores:
        """Norms of all gradients of a batch, by the same names, (K, n); or of the shares of positions in them, (K, n, T)."""
        pairs = [(part.name, part.norms(positions)) for part in view.parts]
        return root_sums([(name, norms) for name, norms in pairs if norms is not None])


def root_sums(norms: Iterable[tuple[str, Tensor]]) -> Scores:
    """Norms of parts of layers, put together by the names of the layers."""
    return by_layer(norms, torch.hypot)

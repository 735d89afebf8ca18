"""Some parameters on which a matrix acts by itself: gradients there, their products with it, and inner products."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from curvalg.errors import ProblemError
from curvalg.estimate.attribution.units.layer_parts import HeldProducts, LayerPart
from curvalg.problem.model.layer_record import LayerRecord, steps

View = TypeVar("View")
Scores = dict[str, Tensor]
"""Name of a layer -> (P, K, n)."""


class ParameterUnit(ABC, Generic[View]):
    """Some parameters, and the block A of a matrix on them.

    Args:
        names: of the parameters.
        size: how many numbers they are.
    """

    def __init__(self, names: tuple[str, ...], size: int) -> None:
        self.names, self.size = names, size

    @abstractmethod
    def view(self, records: Sequence[LayerRecord]) -> View:
        """What all of the following see of the gradients of a batch."""

    @abstractmethod
    def gather(self, view: View, rows: slice) -> Tensor:
        """The gradients of all samples of some rows, in coordinates of the unit (P, ...): the samples of a row after each
        other."""

    @abstractmethod
    def multiply(self, gradients: Tensor) -> Tensor:
        """Products A g of gradients in coordinates of the unit (P, ...)."""

    @abstractmethod
    def project(self, view: View, products: Tensor, positions: bool = False) -> Scores:
        """Inner products with all gradients of a batch, by layer; or the shares of positions in these, (P, K, n, T)."""

    @abstractmethod
    def hold(self, products: Tensor, parts: Sequence[LayerPart[Any]], rank: int) -> list[HeldProducts]:
        """What is held of products in coordinates of the unit, part by part of its layers.

        Args:
            products: (P, ...).
            parts: the layers, on any batch.
            rank: of weights.
        """

    def quadratic(self, view: View, rows: int, columns: int) -> Tensor:
        """The forms gᵀ A g of all gradients of a batch, (K, n)."""
        found = []
        for some in steps(rows, 4 * columns * self.size, torch.float64):
            g = self.gather(view, some)
            found.append((g * self.multiply(g)).flatten(1).sum(1))
        return torch.cat(found).reshape(rows, columns).T

    def covariance(self, view: View, rows: int, columns: int) -> Tensor:
        """The forms gᵀ A g' of all pairs of gradients of a row, (n, K, K)."""
        found = []
        for some in steps(rows, 4 * columns * self.size, torch.float64):
            g = self.gather(view, some)
            left, right = (t.reshape(-1, columns, self.size) for t in (g, self.multiply(g)))
            found.append(left @ right.mT)
        return torch.cat(found)


class FlatUnit(ParameterUnit[list[LayerRecord]]):
    """Gradients as vectors of parameters.

    Args:
        shapes: of the parameters, in the order of the vectors.
        apply: X -> A X for columns.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], apply: Callable[[Tensor], Tensor]) -> None:
        self.shapes = dict(shapes)
        self._sizes = [math.prod(shape) for shape in self.shapes.values()]
        super().__init__(tuple(self.shapes), sum(self._sizes))
        self._apply = apply

    def view(self, records: Sequence[LayerRecord]) -> list[LayerRecord]:
        return selected(records, self.names)

    def gather(self, view: list[LayerRecord], rows: slice) -> Tensor:
        found: dict[str, Tensor] = {}
        for record in view:
            found |= {name: g.transpose(0, 1).flatten(0, 1) for name, g in record.explicit(rows).items()}
        return torch.cat([found[name].reshape(found[name].shape[0], -1) for name in self.shapes], 1)

    def multiply(self, gradients: Tensor) -> Tensor:
        return self._apply(gradients.T).T

    def project(self, view: list[LayerRecord], products: Tensor, positions: bool = False) -> Scores:
        directions = self._directions(products)
        ways = ((r.name, r.project_positions if positions else r.project) for r in view)
        return by_layer((name, way(directions)) for name, way in ways)

    def hold(self, products: Tensor, parts: Sequence[LayerPart[Any]], rank: int) -> list[HeldProducts]:
        directions = self._directions(products)
        return [part.hold(directions, rank) for part in parts]

    def _directions(self, products: Tensor) -> dict[str, Tensor]:
        parts = zip(self.shapes.items(), products.split(self._sizes, 1), strict=True)
        return {name: part.reshape(-1, *shape) for (name, shape), part in parts}


def selected(records: Sequence[LayerRecord], names: Collection[str]) -> list[LayerRecord]:
    """The records of some parameters, those of others left out."""
    chosen = frozenset(names)
    touched = [record for record in records if not chosen.isdisjoint(record.params)]
    mine = [record if chosen.issuperset(record.params) else record.select(chosen) for record in touched]
    return [record for record in mine if record is not None]


def by_layer(found: Iterable[tuple[str, Tensor]], together: Callable[[Tensor, Tensor], Tensor] = torch.add) -> Scores:
    """Numbers of parts of layers, such as scores (P, K, n) or (P, K, n, T), put together by the names of the layers.

    Args:
        found: name and numbers of each part.
        together: the numbers of two parts as those of both; by default they are added up.

    Raises:
        ProblemError: parts of a layer have different numbers of positions.
    """
    scores: Scores = {}
    for name, inner in found:
        if name in scores and scores[name].shape != inner.shape:
            raise ProblemError(
                f"by='position': parameters of {name or 'the root'} are used at {scores[name].shape[-1]} and at "
                f"{inner.shape[-1]} positions of a row; choose some of them with Problem(params=...), or pass by='layer'"
            )
        scores[name] = together(scores[name], inner) if name in scores else inner
    return scores

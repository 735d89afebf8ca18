"""Layers whose gradients are no larger than their deltas: scales, shifts, and gradients that are given explicitly."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from curvalg.problem.layers.kinds.arrangement import Lying
from curvalg.problem.layers.kinds.embedding import TABLE_LIMIT
from curvalg.problem.layers.kinds.maps import WeightForm
from curvalg.problem.layers.origin import Origin, PathStep
from curvalg.problem.model.layer_record import FactorPairs, GuardedInput, Kind, LayerRecord, ParameterGroup, bytes_of


class VectorRecord(LayerRecord):
    """A record that computes everything from the gradients of each parameter as vectors (K, n, size)."""

    @abstractmethod
    def _vectors(self, name: str) -> Tensor:
        """The gradients (K, n, size) of one parameter."""

    def _flat(self, name: str) -> Tensor:
        return self._vectors(name).reshape(self.columns * self.rows, -1)

    def project(self, directions: Mapping[str, Tensor]) -> Tensor:
        count, mine = self._directions(directions)
        total = self.deltas.new_zeros(count, self.columns * self.rows)
        for name, v in mine.items():
            total += v.reshape(count, -1) @ self._flat(name).T
        return total.reshape(count, self.columns, self.rows)

    def project_positions(self, directions: Mapping[str, Tensor]) -> Tensor:
        count, mine = self._directions(directions)
        total = self.deltas.new_zeros(count, *self.deltas.shape[:3])
        for name, v in mine.items():
            total += torch.einsum("kntd,pd->pknt", self._at_positions(name), v.reshape(count, -1))
        return total

    @abstractmethod
    def _at_positions(self, name: str) -> Tensor:
        """The shares of the positions in the gradients of one parameter (K, n, T, size)."""

    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        count, flat = weights.shape[0], weights.reshape(weights.shape[0], -1)
        return {name: (flat @ self._flat(name)).reshape(count, *self.place.shapes[name]) for name in self.params}

    def _gram(self, other: LayerRecord) -> Tensor:
        assert isinstance(other, VectorRecord)
        products = [self._flat(name) @ other._flat(name).T for name in self.params]
        return sum(products[1:], products[0]).reshape(self.columns, self.rows, other.columns, other.rows)

    def squares(self) -> dict[str, Tensor]:
        return {name: self._flat(name).square().sum(0).reshape(self.place.shapes[name]) for name in self.params}

    def square_norms(self) -> Tensor:
        return torch.stack([self._vectors(name).square().sum(-1) for name in self.params]).sum(0)

    def explicit(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        some = {name: self._vectors(name)[:, rows] for name in self.params}
        return {name: v.reshape(*v.shape[:2], *self.place.shapes[name]) for name, v in some.items()}


class Shift(VectorRecord):
    """A parameter that is added: g = Σₜ δ.

    Args:
        place: of one parameter.
        deltas: (K, n, T, size).
    """

    kind: ClassVar[Kind] = "shift"

    def __init__(self, place: ParameterGroup, deltas: Tensor) -> None:
        super().__init__(place, *deltas.shape[:2])
        self._deltas = deltas
        self._sum: Tensor | None = None

    @property
    def inputs(self) -> Tensor | None:
        return None

    @property
    def deltas(self) -> Tensor:
        return self._deltas

    @property
    def nbytes(self) -> int:
        return bytes_of(self._deltas)

    def select(self, names: Collection[str]) -> LayerRecord | None:
        return self if self.params[0] in names else None

    def factor_pairs(self) -> list[FactorPairs] | str:
        (name,) = self.params
        shape = self.shapes[name]
        long = [size for size in shape if size > 1]
        if not 1 <= len(long) <= 2 or long[0] > TABLE_LIMIT:
            return super().factor_pairs()
        if len(long) == 1:  # the bias of a linear layer whose input is one
            d = self._deltas
            way = Origin(name).then(PathStep("one column", partial(torch.reshape, shape=(-1, 1))))
            lying = Lying(((name, shape),), WeightForm(torch.Size((*long, 1))), way)
            return [FactorPairs(name, None, d.new_ones(1, self.rows, d.shape[2], 1), d[None], lying)]
        # As a table of positions that are all picked for every row.
        d = self._vectors(name).reshape(self.columns, self.rows, *long)
        hot = torch.eye(long[0], dtype=d.dtype, device=d.device)
        return [table_pairs(name, shape, d, hot)]

    def _at_positions(self, name: str) -> Tensor:
        return self._deltas

    def _vectors(self, name: str) -> Tensor:
        if self._sum is None:
            self._sum = self._deltas[:, :, 0] if self._deltas.shape[2] == 1 else self._deltas.sum(2)
        return self._sum


def table_pairs(name: str, shape: torch.Size, deltas: Tensor, hot: Tensor) -> FactorPairs:
    """The pairs of a table of positions of which the same rows are added for every row of the batch.

    Args:
        name: of the table.
        shape: of the table: (size, width) between axes of one.
        deltas: (K, n, T, width).
        hot: which of its rows are added (T, size), zeros and ones.
    """
    size, width = (length for length in shape if length > 1)
    way = Origin(name)
    if len(shape) > 2:
        way = way.then(PathStep(f"reshape{(size, width)}", partial(torch.reshape, shape=(size, width))))
    lying = Lying(((name, shape),), WeightForm(torch.Size((size, width)), transposed=True), way)
    return FactorPairs(name, None, hot.expand(1, deltas.shape[1], -1, -1), deltas[None], lying)


class Explicit(Shift):
    """Explicit gradients of one parameter, for which there was no rule.

    Args:
        place: of the parameter.
        gradients: (K, n, *parameter.shape).
        reason: why there was none.
    """

    kind: ClassVar[Kind] = "explicit"

    def __init__(self, place: ParameterGroup, gradients: Tensor, reason: str) -> None:
        super().__init__(place, gradients.reshape(*gradients.shape[:2], 1, -1))
        self._reason = reason

    def factor_pairs(self) -> str:
        return self._reason


class ElementwiseLayer(VectorRecord):
    """A parameter that is multiplied elementwise, and one that is then added: g = Σₜ δ ∘ h, and Σₜ δ.

    Args:
        place: of the parameters.
        weight: name of the factor.
        bias: name of the summand, or None.
        inputs: (n, T, size).
        deltas: (K, n, T, size).
    """

    kind = "scale"

    def __init__(
        self, place: ParameterGroup, weight: str, bias: str | None, inputs: GuardedInput, deltas: Tensor
    ) -> None:
        super().__init__(place, *deltas.shape[:2])
        self._names = weight, bias
        self.weight, self.bias = weight, bias
        self._inputs = inputs
        self._deltas = deltas
        self._sums: dict[str, Tensor] = {}

    @property
    def inputs(self) -> Tensor | None:
        return self._inputs.tensor

    @property
    def deltas(self) -> Tensor:
        return self._deltas

    @property
    def nbytes(self) -> int:
        return bytes_of(self._inputs.tensor, self._deltas)

    def select(self, names: Collection[str]) -> LayerRecord | None:
        place, (weight, bias) = self.place.of(names), self._names
        if weight in names:
            return ElementwiseLayer(place, weight, bias if bias in place.params else None, self._inputs, self._deltas)
        return Shift(place, self._deltas) if bias in place.params else None

    def _at_positions(self, name: str) -> Tensor:
        return self._deltas * self._inputs.tensor if name == self._names[0] else self._deltas

    def _vectors(self, name: str) -> Tensor:
        inputs = self._inputs.tensor
        if self._deltas.shape[2] == 1:  # as large as the deltas: cheaper to compute than to keep
            deltas = self._deltas[:, :, 0]
            return deltas * inputs[:, 0] if name == self._names[0] else deltas
        if name not in self._sums:
            weighed = name == self._names[0]
            self._sums[name] = torch.einsum("kntd,ntd->knd", self._deltas, inputs) if weighed else self._deltas.sum(2)
        return self._sums[name]

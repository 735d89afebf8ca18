"""Embedding tables: each position's delta belongs to one row of the table."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from curvalg.problem.layers.kinds.arrangement import Lying
from curvalg.problem.layers.kinds.maps import WeightForm
from curvalg.problem.layers.kinds.multiplied_out import is_cheaper, project_explicit
from curvalg.problem.layers.kinds.pairs import pair_gram
from curvalg.problem.layers.origin import Origin
from curvalg.problem.model.layer_record import FactorPairs, GuardedInput, LayerRecord, ParameterGroup, bytes_of, steps

MOVED = 16
"""Multiplications in a matrix product of many columns that take as long as one number that is picked and multiplied alone."""
TABLE_LIMIT = 4096
"""The most rows of a table whose input factor, rows x rows, is built."""


class Embedding(LayerRecord):
    """An embedding table: row hₙₜ of the gradient is the sum of the δₖₙₜ with that index.

    Args:
        place: of the table (size, d).
        inputs: indices (n, T).
        deltas: (K, n, T, d), zero where the index is the padding.
    """

    kind = "embedding"

    def __init__(self, place: ParameterGroup, inputs: GuardedInput, deltas: Tensor) -> None:
        super().__init__(place, *deltas.shape[:2])
        (self._table,) = place.params
        self.weight = self._table
        self._size = place.shapes[self._table][0]
        self._inputs = inputs
        self._deltas = deltas

    @property
    def inputs(self) -> Tensor:
        return self._inputs.tensor

    @property
    def deltas(self) -> Tensor:
        return self._deltas

    @property
    def nbytes(self) -> int:
        return bytes_of(self._inputs.tensor, self._deltas)

    def select(self, names: Collection[str]) -> LayerRecord | None:
        return self if self._table in names else None

    def factor_pairs(self) -> list[FactorPairs] | str:
        if self._size > TABLE_LIMIT:
            return f"it is a table of more than {TABLE_LIMIT} rows, whose input factor would be as wide"
        shape = self.shapes[self._table]
        hot = torch.nn.functional.one_hot(self._inputs.tensor, self._size).to(self._deltas.dtype)
        lying = Lying(((self._table, shape),), WeightForm(shape, transposed=True), Origin(self._table))
        return [FactorPairs(self._table, None, hot[None], self._deltas[None], lying)]

    def project(self, directions: Mapping[str, Tensor]) -> Tensor:
        count, mine = self._directions(directions)
        gathered = self._deltas[0].numel() * count * (1 + self.columns)
        explicit = self.columns * self.rows * self._size * self._deltas.shape[-1]
        if mine and count > MOVED and is_cheaper(MOVED * gathered, explicit * (count + MOVED)):
            return project_explicit(self, count, mine)
        result = self._deltas.new_zeros(count, self.columns, self.rows)
        if self._table in mine:
            indices, table = self._inputs.tensor, mine[self._table]
            for p in steps(count, self._deltas[0].numel(), self._deltas.dtype):
                result[p] = torch.einsum("pntd,kntd->pkn", table[p][:, indices], self._deltas)
        return result

    def project_positions(self, directions: Mapping[str, Tensor]) -> Tensor:
        count, mine = self._directions(directions)
        result = self._deltas.new_zeros(count, *self._deltas.shape[:3])
        if self._table in mine:
            indices, table = self._inputs.tensor, mine[self._table]
            for p in steps(count, self._deltas[0].numel(), self._deltas.dtype):
                result[p] = torch.einsum("pntd,kntd->pknt", table[p][:, indices], self._deltas)
        return result

    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        d = self._deltas
        result = d.new_zeros(weights.shape[0], self._size, d.shape[-1])
        for p in steps(weights.shape[0], d[0].numel(), d.dtype):
            mixed = torch.einsum("pkn,kntd->pntd", weights[p], d)
            result[p].index_add_(1, self._inputs.tensor.reshape(-1), mixed.flatten(1, 2))
        return {self._table: result}

    def _gram(self, other: LayerRecord) -> Tensor:
        assert isinstance(other, Embedding)
        mine, its = self._inputs.tensor, other._inputs.tensor

        def same(a: slice, b: slice) -> Tensor:
            return (mine[a, :, None, None] == its[b]).to(self._deltas.dtype)

        return pair_gram(self._deltas, other._deltas, same)

    def _sums(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The number of columns, the row and index of every sum, and Σₜ δ over the places of a row with the same index."""
        indices, d = self._inputs.tensor, self._deltas
        keys = indices + self._size * torch.arange(self.rows, device=indices.device)[:, None]
        found, segment = keys.unique(return_inverse=True)
        for k in steps(self.columns, d[0].numel(), d.dtype):
            part = d[k].flatten(1, 2)
            sums = part.new_zeros(part.shape[0], len(found), d.shape[-1])
            yield k, found, sums.index_add_(1, segment.reshape(-1), part)

    def squares(self) -> dict[str, Tensor]:
        # An index that a row has several times counts with the square of its sum.
        result = self._deltas.new_zeros(self._size, self._deltas.shape[-1])
        for _, found, sums in self._sums():
            result.index_add_(0, found % self._size, sums.square_().sum(0))
        return {self._table: result}

    def square_norms(self) -> Tensor:
        result = self._deltas.new_zeros(self.columns, self.rows)
        for k, found, sums in self._sums():
            result[k] = result[k].index_add(1, found // self._size, sums.square_().sum(2))
        return result

    def explicit(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        d = self._deltas[:, rows]
        result = d.new_zeros(*d.shape[:2], self._size, d.shape[-1])
        index = self._inputs.tensor[None, rows, :, None].expand(d.shape)
        return {self._table: result.scatter_add_(2, index, d)}

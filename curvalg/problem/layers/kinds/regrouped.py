"""Records of a model that computes several rows of its output together."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from curvalg.problem.model.layer_record import FactorPairs, LayerRecord


class Regrouped(LayerRecord):
    """A record whose rows are groups of rows of the output, each of which has columns of its own: seen row by row.

    Args:
        inner: the record with K · size columns and n / size rows; column k · size + j is that of row j of each group.
        size: rows of a group.
    """

    kind = "joint"

    def __init__(self, inner: LayerRecord, size: int) -> None:
        super().__init__(inner.place, inner.columns // size, inner.rows * size)
        self._inner, self._size = inner, size
        self.weight, self.bias, self.transposed = inner.weight, inner.bias, inner.transposed

    def _apart(self, tensor: Tensor, axis: int) -> Tensor:
        """Axes (K · size, n / size) from an axis on, as (K, n)."""
        parts: Tensor = tensor.unflatten(axis, (self.columns, self._size)).transpose(axis + 1, axis + 2)
        return parts.flatten(axis + 1, axis + 2)

    def _together(self, weights: Tensor) -> Tensor:
        """Last axes (K, n) as (K · size, n / size)."""
        parts: Tensor = weights.unflatten(-1, (-1, self._size))
        return parts.transpose(-1, -2).flatten(-3, -2)

    @property
    def nbytes(self) -> int:
        return self._inner.nbytes

    @property
    def input_bytes(self) -> int:
        return self._inner.input_bytes

    @property
    def inputs(self) -> Tensor | None:
        inputs = self._inner.inputs
        return (
            None
            if inputs is None
            else inputs.repeat_interleave(self._size, inputs.ndim - (2 if inputs.ndim == 2 else 3))
        )

    @property
    def deltas(self) -> Tensor:
        deltas = self._inner.deltas
        return self._apart(deltas, deltas.ndim - 4)

    def select(self, names: Collection[str]) -> LayerRecord | None:
        part = self._inner.select(names)
        return None if part is None else Regrouped(part, self._size)

    def project(self, directions: Mapping[str, Tensor]) -> Tensor:
        return self._apart(self._inner.project(directions), 1)

    def project_positions(self, directions: Mapping[str, Tensor]) -> Tensor:
        return self._apart(self._inner.project_positions(directions), 1)

    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        return self._inner.combine(self._together(weights))

    def project_each(self, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._apart(found, 1) for name, found in self._inner.project_each(directions).items()}

    def combine_each(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._inner.combine_each({name: self._together(w) for name, w in weights.items()})

    def squares(self) -> dict[str, Tensor]:
        return self._inner.squares()

    def square_norms(self) -> Tensor:
        return self._apart(self._inner.square_norms(), 0)

    def explicit(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        first, last, _ = rows.indices(self.rows)
        groups = slice(first // self._size, -(-last // self._size))
        own = slice(first - groups.start * self._size, last - groups.start * self._size)
        return {name: self._apart(g, 0)[:, own] for name, g in self._inner.explicit(groups).items()}

    def factor_pairs(self) -> list[FactorPairs] | str:
        return self._inner.factor_pairs()

    def _gram(self, other: LayerRecord) -> Tensor:
        assert isinstance(other, Regrouped)
        gram = self._inner.gram(other._inner)
        return other._apart(self._apart(gram, 0), 2)


def apart(cotangents: Tensor, fold: int) -> Tensor:
    """A column for each row of a group: (K · fold, n, ...) of columns (K, n, ...), zero for the other rows."""
    columns, rows = cotangents.shape[:2]
    parts: Tensor = cotangents.unflatten(1, (rows // fold, fold))
    mask = torch.eye(fold, dtype=cotangents.dtype, device=cotangents.device)
    mask = mask.reshape(1, fold, 1, fold, *[1] * (cotangents.ndim - 2))
    return (parts[:, None] * mask).reshape(columns * fold, *cotangents.shape[1:])

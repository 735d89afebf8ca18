"""Dense layers: linear maps of inputs or patches, with the weight shared by all positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor

from curvalg.problem.layers.kinds.arrangement import Lying
from curvalg.problem.layers.kinds.maps import LinearMap
from curvalg.problem.layers.kinds.multiplied_out import is_cheaper, project_explicit
from curvalg.problem.layers.kinds.pairs import explicit_gram, pair_flops, pair_gram, passes
from curvalg.problem.layers.kinds.scaling import Shift
from curvalg.problem.layers.origin import Origin
from curvalg.problem.model.layer_record import FactorPairs, LayerRecord, ParameterGroup, bytes_of, steps

FEW = 256
"""Pairs of directions and columns up to which deltas are mixed one after the other."""


class AffineLayer(LayerRecord):
    """A dense layer: g = Σₜ δ hᵀ for the weight, Σₜ δ for the bias.

    Args:
        place: of the parameters.
        weight: name of the weight.
        bias: name of the bias, or None.
        layer: the map of the weight at h (groups, n, T, in).
        deltas: δ (groups, K, n, T, out).
    """

    kind = "dense"

    def __init__(self, place: ParameterGroup, weight: str, bias: str | None, layer: LinearMap, deltas: Tensor) -> None:
        super().__init__(place, *deltas.shape[1:3])
        self._weight, self._bias = weight, bias
        self.weight, self.bias, self.transposed = weight, bias, layer.form.transposed
        self._groups = layer.form.groups
        self._map = layer
        self._deltas = deltas

    @property
    def inputs(self) -> Tensor:
        h = self._map.inputs()
        return h[0] if self._groups == 1 else h

    @property
    def deltas(self) -> Tensor:
        return self._deltas[0] if self._groups == 1 else self._deltas

    @property
    def nbytes(self) -> int:
        return self._map.nbytes + bytes_of(self._deltas)

    @property
    def input_bytes(self) -> int:
        return self._map.nbytes

    def select(self, names: Collection[str]) -> LayerRecord | None:
        place = self.place.of(names)
        if self._weight in names:
            bias = self._bias if self._bias in place.params else None
            return AffineLayer(place, self._weight, bias, self._map, self._deltas)
        return Shift(place, ungrouped(self._deltas)) if self._bias in place.params else None

    def factor_pairs(self) -> list[FactorPairs]:
        bias = None if self._bias is None else Origin(self._bias)
        shapes = tuple((name, self.shapes[name]) for name in (self._weight, self._bias) if name is not None)
        lying = Lying(shapes, self._map.form, Origin(self._weight), bias)
        real = None if self.real is None else self.real.expand(self._groups, *self.real.shape)
        return [FactorPairs(self._weight, self._bias, self._map.inputs(), self._deltas, lying, real)]

    # -- products ---------------------------------------------------------------------------------------------------------

    def project(self, directions: Mapping[str, Tensor]) -> Tensor:
        count, mine = self._directions(directions)
        d = self._deltas
        groups, columns, rows, positions, out = d.shape
        width, deltas = self._map.form.width, groups * rows * positions * out
        if self._weight in mine and is_cheaper(
            deltas * count * (width + columns), columns * width * (deltas + groups * rows * out * count)
        ):
            return project_explicit(self, count, mine)
        result = d.new_zeros(count, columns, rows)
        weight, bias = mine.get(self._weight), mine.get(self._bias or "")
        for p in steps(count if mine else 0, deltas, d.dtype):
            result[p] = _inner(self._tangents(weight, bias, p), d)
        return result

    def project_positions(self, directions: Mapping[str, Tensor]) -> Tensor:
        count, mine = self._directions(directions)
        d = self._deltas
        result = d.new_zeros(count, *d.shape[1:4])
        weight, bias = mine.get(self._weight), mine.get(self._bias or "")
        for p in steps(count if mine else 0, d[:, 0].numel(), d.dtype):
            result[p] = torch.einsum("gntpo,gknto->pknt", self._tangents(weight, bias, p), d)
        return result

    def _tangents(self, weight: Tensor | None, bias: Tensor | None, p: slice) -> Tensor:
        """What some directions of the weight or the bias, or both, do to the outputs: (groups, n, T, P, out)."""
        groups, _, rows, positions, out = self._deltas.shape
        if weight is None:
            assert bias is not None
            return self._shift(bias[p]).expand(groups, rows, positions, p.stop - p.start, out)
        tangent = self._map.push(weight[p])
        if bias is not None:
            tangent += self._shift(bias[p])
        return tangent

    def _shift(self, bias: Tensor) -> Tensor:
        """Directions (P, size) of the bias, to be broadcast as tangents (groups, n, T, P, out)."""
        return bias.reshape(bias.shape[0], self._groups, 1, 1, -1).permute(1, 2, 3, 0, 4)

    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        d = self._deltas
        groups, _, rows, positions, out = d.shape
        found: dict[str, list[Tensor]] = {name: [] for name in self.params}
        for p in steps(weights.shape[0], groups * rows * positions * out, d.dtype):
            mixed = _mixed(weights[p], d)  # (groups, n, T, P, out)
            found[self._weight].append(self._map.pull(mixed))
            if self._bias is not None:
                found[self._bias].append(mixed.sum((1, 2)).transpose(0, 1).reshape(mixed.shape[3], -1))
        return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in found.items()}

    def project_each(self, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        count, mine = self._directions(directions)
        if self._bias is None or len(mine) < 2 or self._deltas.shape[3] > 1:
            return super().project_each(directions)
        pushed = self._map.push(mine[self._weight])
        both = _inner(torch.cat([pushed, self._shift(mine[self._bias]).expand_as(pushed)], 3), self._deltas)
        return {self._weight: both[:count], self._bias: both[count:]}

    def combine_each(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._bias is None or self._deltas.shape[3] > 1:
            return super().combine_each(weights)
        count = weights[self._weight].shape[0]
        mixed = _mixed(torch.cat([weights[self._weight], weights[self._bias]]), self._deltas)
        bias = mixed[:, :, :, count:].sum((1, 2)).transpose(0, 1).reshape(count, -1)
        return {self._weight: self._map.pull(mixed[:, :, :, :count]), self._bias: bias}

    # -- squares and inner products -----------------------------------------------------------------------------------------

    def _matrices(self, group: int, h: Tensor, rows: slice) -> Tensor:
        """Gradients of the weight of one group for some rows with inputs h (n, T, in), (n, K, out, in)."""
        d = self._deltas[group, :, rows].transpose(0, 1)
        count, columns, positions, out = d.shape
        return (d.transpose(2, 3).reshape(count, columns * out, positions) @ h).reshape(count, columns, out, -1)

    def _by_rows(self) -> Callable[[slice], Tensor]:
        """A function rows -> h of these rows (groups, n, T, in): patches only of as many rows as are asked for."""
        if self._groups == 1:
            return self._map.inputs
        every = self._map.inputs()  # asked for once by each group
        return lambda rows: every[:, rows]

    def _gram(self, other: LayerRecord) -> Tensor:
        assert isinstance(other, AffineLayer)
        total: Tensor | None = None
        h, h_ = self._by_rows(), other._by_rows()
        for group in range(self._groups):
            part = self._group_gram(other, group, lambda a, g=group: h(a)[g], lambda b, g=group: h_(b)[g])  # type: ignore[misc]
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def _group_gram(
        self, other: AffineLayer, group: int, h: Callable[[slice], Tensor], h_: Callable[[slice], Tensor]
    ) -> Tensor:
        d, d_, width = self._deltas[group], other._deltas[group], self._map.form.width
        shape = (*d.shape[:2], *d_.shape[:2])
        if d.shape[2] == d_.shape[2] == 1:
            similarity = h(slice(None))[:, 0] @ h_(slice(None))[:, 0].T
            if self._bias is not None:
                similarity += 1
            return _outer(d, d_).reshape(shape).mul_(similarity[None, :, None, :])
        size = width * d.shape[-1]
        columns, rows, others, other_rows = shape
        again = passes(rows, columns, size, d.dtype)
        multiplied_out = size * (
            columns * rows * (d.shape[2] + others * other_rows) + others * other_rows * d_.shape[2] * again
        )
        if multiplied_out < pair_flops(d, d_, width):
            gram = explicit_gram(
                lambda a: self._matrices(group, h(a), a).flatten(2),
                lambda b: other._matrices(group, h_(b), b).flatten(2),
                shape,
                d,
                size,
            )
        else:
            gram = pair_gram(d, d_, lambda a, b: torch.tensordot(h(a), h_(b), ([2], [2])))
        if self._bias is not None:
            gram += _outer(d.sum(2), d_.sum(2)).reshape(shape)
        return gram

    def _by_weight(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Gradients of the weight, a group and some rows at a time: (group, rows, (n, K, out, in))."""
        inputs, form = self._by_rows(), self._map.form
        elements = self.columns * math.prod(form.shape) // self._groups
        for rows in steps(self.rows, elements, self._deltas.dtype):
            h = inputs(rows)
            for group in range(self._groups):
                yield group, rows, self._matrices(group, h[group], rows)

    def squares(self) -> dict[str, Tensor]:
        d, form = self._deltas, self._map.form
        if d.shape[3] == 1:
            matrices = d.square().sum(1)[:, :, 0].mT @ self._map.inputs()[:, :, 0].square()
        else:
            matrices = form.matrices(d.new_zeros(1, *form.shape))[0]
            for group, _, part in self._by_weight():
                matrices[group] += part.square_().sum((0, 1))
        found = {self._weight: form.parameter(matrices[None])[0]}
        if self._bias is not None:
            found[self._bias] = d.sum(3).square_().sum((1, 2)).reshape(-1)
        return {name: found[name] for name in self.params}

    def square_norms(self) -> Tensor:
        d = self._deltas
        bias = 0.0 if self._bias is None else 1.0
        if d.shape[3] == 1:
            sizes = self._map.inputs().square().sum((2, 3)) + bias
            return (d.square().sum((3, 4)) * sizes[:, None]).sum(0)
        total = d.new_zeros(self.columns, self.rows)
        for _, rows, part in self._by_weight():
            total[:, rows] += part.square_().sum((2, 3)).T
        return total if self._bias is None else total.add_(d.sum(3).square_().sum((0, 3)))

    def explicit(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        h, form = self._map.inputs(rows), self._map.form
        parts = [self._matrices(g, h[g], rows) for g in range(self._groups)]
        every = parts[0][:, :, None] if self._groups == 1 else torch.stack(parts, 2)
        lead = (self.columns, every.shape[0])
        found = {self._weight: form.parameter(every.transpose(0, 1).flatten(0, 1)).reshape(*lead, *form.shape)}
        if self._bias is not None:
            found[self._bias] = ungrouped(self._deltas[:, :, rows]).sum(2)
        return {name: found[name] for name in self.params}


def ungrouped(deltas: Tensor) -> Tensor:
    """(groups, K, n, T, out) as (K, n, T, groups · out)."""
    return deltas[0] if deltas.shape[0] == 1 else deltas.permute(1, 2, 3, 0, 4).flatten(3)


def _inner(tangents: Tensor, deltas: Tensor) -> Tensor:
    """Σ over groups, positions and outputs of tangents (groups, n, T, P, out) and deltas, shape (P, K, n)."""
    # Batched over rows, with the deltas as a view: einsum would copy them, and they are the largest tensor there is.
    rows = tangents.permute(0, 1, 3, 2, 4).flatten(3)
    products = torch.matmul(deltas.transpose(1, 2).flatten(3), rows.mT)
    return products.sum(0).permute(2, 1, 0)


def _mixed(weights: Tensor, deltas: Tensor) -> Tensor:
    """Weighted sums Σₖ wₚₖₙ δₖₙ, shape (groups, n, T, P, out)."""
    directions, columns, _ = weights.shape
    if directions * columns > FEW:
        return torch.einsum("pkn,gknto->gntpo", weights, deltas)
    # Matrices of a few rows are slow to multiply: column by column instead.
    mixed = []
    for w in weights[..., None, None]:
        total = deltas[:, 0] * w[0]
        for k in range(1, columns):
            total.addcmul_(deltas[:, k], w[k])
        mixed.append(total)
    return torch.stack(mixed, 3)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """All inner products along the last axis, of two stacks (K, n, ..., out)."""
    width = left.shape[-1]
    return left.reshape(-1, width) @ right.reshape(-1, width).T

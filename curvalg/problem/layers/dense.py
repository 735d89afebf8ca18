"""Dense layers: linear maps of inputs or patches, with the weight shared by all positions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from curvalg.problem.layers.pairs import explicit_gram, pair_flops, pair_gram, passes
from curvalg.problem.layers.record import Held, LayerRecord, Place, bytes_of, steps
from curvalg.problem.layers.vectors import Shift

FEW = 256
"""Pairs of directions and columns up to which deltas are mixed one after the other."""


@dataclass(frozen=True)
class WeightForm:
    """How a weight lies as one matrix (out, in) per group.

    Args:
        shape: of the parameter.
        groups: of the convolution.
        transposed: input channels first, (in, out / groups, ...), as in transposed convolutions.
    """

    shape: torch.Size
    groups: int = 1
    transposed: bool = False

    def matrices(self, weights: Tensor) -> Tensor:
        """(P, *shape) as (P, groups, out, in)."""
        if not self.transposed:
            return weights.reshape(weights.shape[0], self.groups, self.shape[0] // self.groups, -1)
        inner, out = self.shape[0] // self.groups, self.shape[1]
        return weights.reshape(-1, self.groups, inner, out, *self.shape[2:]).transpose(2, 3).flatten(3)

    def parameter(self, matrices: Tensor) -> Tensor:
        """The inverse of :meth:`matrices`."""
        if not self.transposed:
            return matrices.reshape(-1, *self.shape)
        inner, out = self.shape[0] // self.groups, self.shape[1]
        parts = matrices.reshape(-1, self.groups, out, inner, *self.shape[2:])
        return parts.transpose(2, 3).reshape(-1, *self.shape)


class Dense(LayerRecord):
    """g = Σₜ δ hᵀ for the weight, Σₜ δ for the bias.

    Args:
        place: of the parameters.
        weight: name of the weight.
        bias: name of the bias, or None.
        form: of the weight.
        inputs: h (groups, n, T, in).
        deltas: δ (groups, K, n, T, out).
    """

    kind = "dense"

    def __init__(
        self, place: Place, weight: str, bias: str | None, form: WeightForm, inputs: Held, deltas: Tensor
    ) -> None:
        super().__init__(place, *deltas.shape[1:3])
        self._weight, self._bias = weight, bias
        self.weight, self.bias, self.transposed = weight, bias, form.transposed
        self._form = form
        self._inputs = inputs
        self._deltas = deltas

    @property
    def inputs(self) -> Tensor:
        h = self._inputs.tensor
        return h[0] if self._form.groups == 1 else h

    @property
    def deltas(self) -> Tensor:
        return self._deltas[0] if self._form.groups == 1 else self._deltas

    @property
    def nbytes(self) -> int:
        return bytes_of(self._inputs.tensor, self._deltas)

    def select(self, names: Collection[str]) -> LayerRecord | None:
        place = self.place.of(names)
        if self._weight in names:
            bias = self._bias if self._bias in place.params else None
            return Dense(place, self._weight, bias, self._form, self._inputs, self._deltas)
        return Shift(place, ungrouped(self._deltas)) if self._bias in place.params else None

    # -- products ---------------------------------------------------------------------------------------------------------

    def project(self, directions: Mapping[str, Tensor]) -> Tensor:
        count, mine = self._directions(directions)
        h, d = self._inputs.tensor, self._deltas
        groups, columns, rows, positions, out = d.shape
        result = d.new_zeros(count, columns, rows)
        weight, bias = mine.get(self._weight), mine.get(self._bias or "")
        for p in steps(count if mine else 0, groups * rows * positions * out, d.dtype):
            width = p.stop - p.start
            if weight is not None:
                # One column per direction and output: (groups, in, directions · out).
                matrix = self._form.matrices(weight[p]).permute(1, 3, 0, 2).flatten(2)
                tangent = (h.flatten(1, 2) @ matrix).reshape(groups, rows, positions, width, out)
                if bias is not None:
                    tangent += bias[p].reshape(width, groups, 1, 1, out).permute(1, 2, 3, 0, 4)
            else:
                assert bias is not None
                shift = bias[p].reshape(width, groups, 1, 1, out).permute(1, 2, 3, 0, 4)
                tangent = shift.expand(groups, rows, positions, width, out)
            result[p] = _inner(tangent, d)
        return result

    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        h, d = self._inputs.tensor, self._deltas
        groups, _, rows, positions, out = d.shape
        found: dict[str, list[Tensor]] = {name: [] for name in self.params}
        for p in steps(weights.shape[0], groups * rows * positions * out, d.dtype):
            mixed = _mixed(weights[p], d)  # (groups, n, T, P, out)
            width = mixed.shape[3]
            matrices = mixed.reshape(groups, rows * positions, width * out).mT @ h.flatten(1, 2)
            matrices = matrices.reshape(groups, width, out, -1).transpose(0, 1)
            found[self._weight].append(self._form.parameter(matrices))
            if self._bias is not None:
                found[self._bias].append(mixed.sum((1, 2)).transpose(0, 1).reshape(width, -1))
        return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in found.items()}

    def project_each(self, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As for every record; with one position, reading the deltas once for both parameters."""
        count, mine = self._directions(directions)
        if self._bias is None or len(mine) < 2 or self._deltas.shape[3] > 1:
            return super().project_each(directions)
        h, d = self._inputs.tensor, self._deltas
        groups, _, rows, positions, out = d.shape
        matrix = self._form.matrices(mine[self._weight]).permute(1, 3, 0, 2).flatten(2)
        pushed = (h.flatten(1, 2) @ matrix).reshape(groups, rows, positions, count, out)
        shift = mine[self._bias].reshape(count, groups, 1, 1, out).permute(1, 2, 3, 0, 4).expand_as(pushed)
        both = _inner(torch.cat([pushed, shift], 3), d)
        return {self._weight: both[:count], self._bias: both[count:]}

    def combine_each(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As for every record; with one position, reading the deltas once for both parameters."""
        if self._bias is None or self._deltas.shape[3] > 1:
            return super().combine_each(weights)
        h, d = self._inputs.tensor, self._deltas
        count = weights[self._weight].shape[0]
        groups, _, rows, positions, out = d.shape
        mixed = _mixed(torch.cat([weights[self._weight], weights[self._bias]]), d)
        mine = mixed[:, :, :, :count].reshape(groups, rows * positions, count * out)
        matrices = (mine.mT @ h.flatten(1, 2)).reshape(groups, count, out, -1).transpose(0, 1)
        bias = mixed[:, :, :, count:].sum((1, 2)).transpose(0, 1).reshape(count, -1)
        return {self._weight: self._form.parameter(matrices), self._bias: bias}

    # -- squares and inner products -----------------------------------------------------------------------------------------

    def _matrices(self, group: int, rows: slice) -> Tensor:
        """Gradients of the weight of one group for some rows, (n, K, out, in)."""
        h, d = self._inputs.tensor[group, rows], self._deltas[group, :, rows].transpose(0, 1)
        count, columns, positions, out = d.shape
        matrices = d.transpose(2, 3).reshape(count, columns * out, positions) @ h
        return matrices.reshape(count, columns, out, -1)

    def _gram(self, other: LayerRecord) -> Tensor:
        assert isinstance(other, Dense)
        total: Tensor | None = None
        for group in range(self._form.groups):
            part = self._group_gram(other, group)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def _group_gram(self, other: Dense, group: int) -> Tensor:
        h, h_, d, d_ = (t[group] for t in (self._inputs.tensor, other._inputs.tensor, self._deltas, other._deltas))
        shape = (*d.shape[:2], *d_.shape[:2])
        if d.shape[2] == d_.shape[2] == 1:
            similarity = h[:, 0] @ h_[:, 0].T
            if self._bias is not None:
                similarity += 1
            return _outer(d, d_).reshape(shape).mul_(similarity[None, :, None, :])
        size = h.shape[-1] * d.shape[-1]
        columns, rows, others, other_rows = shape
        again = passes(rows, columns, size, d.dtype)
        multiplied_out = size * (
            columns * rows * (d.shape[2] + others * other_rows) + others * other_rows * d_.shape[2] * again
        )
        if multiplied_out < pair_flops(d, d_, h.shape[-1]):
            gram = explicit_gram(
                lambda a: self._matrices(group, a).flatten(2),
                lambda b: other._matrices(group, b).flatten(2),
                shape,
                d,
                size,
            )
        else:
            gram = pair_gram(d, d_, lambda a, b: torch.tensordot(h[a], h_[b], ([2], [2])))
        if self._bias is not None:
            gram += _outer(d.sum(2), d_.sum(2)).reshape(shape)
        return gram

    def squares(self) -> dict[str, Tensor]:
        h, d = self._inputs.tensor, self._deltas
        groups, columns, _, positions, out = d.shape
        if positions == 1:
            matrices = d.square().sum(1)[:, :, 0].mT @ h[:, :, 0].square()
        else:
            matrices = d.new_zeros(groups, out, h.shape[-1])
            for group in range(groups):
                for rows in steps(self.rows, columns * out * h.shape[-1], d.dtype):
                    matrices[group] += self._matrices(group, rows).square_().sum((0, 1))
        found = {self._weight: self._form.parameter(matrices[None])[0]}
        if self._bias is not None:
            found[self._bias] = d.sum(3).square_().sum((1, 2)).reshape(-1)
        return {name: found[name] for name in self.params}

    def square_norms(self) -> Tensor:
        h, d = self._inputs.tensor, self._deltas
        groups, columns, _, positions, out = d.shape
        bias = 0.0 if self._bias is None else 1.0
        if positions == 1:
            return (d.square().sum((3, 4)) * (h.square().sum((2, 3)) + bias)[:, None]).sum(0)
        total = d.new_zeros(columns, self.rows)
        for group in range(groups):
            for rows in steps(self.rows, columns * out * h.shape[-1], d.dtype):
                total[:, rows] += self._matrices(group, rows).square_().sum((2, 3)).T
        return total if self._bias is None else total.add_(d.sum(3).square_().sum((0, 3)))

    def explicit(self) -> dict[str, Tensor]:
        every = torch.stack([self._matrices(group, slice(None)) for group in range(self._form.groups)], 2)
        lead = (self.columns, self.rows)
        found = {
            self._weight: self._form.parameter(every.transpose(0, 1).flatten(0, 1)).reshape(*lead, *self._form.shape)
        }
        if self._bias is not None:
            found[self._bias] = ungrouped(self._deltas).sum(2)
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
    """Σₖ wₚₖₙ δₖₙ, shape (groups, n, T, P, out)."""
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

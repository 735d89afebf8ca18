"""A projection of each layer by a Kronecker product, whose factors are applied to inputs and deltas."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from curvalg import FactorPairs, LayerRecord, Layout
from curvalg_plugins.projections.drawn_signs import generator, signs
from curvalg_plugins.projections.explicit_rows import row_slices


class KroneckerSigns:
    """Inner products of gradients with k matrices of signs for each weight, (P ⊗ R) vec g = vec(P g Rᵀ), added up.

    P (a, out) and R (b, in) with a b = k, as near to each other as they can be, have independent signs; those of different
    parameters are independent too, which is why their sums keep inner products on average. Weights are matrices of their first
    axis and the others; parameters of one axis have signs (k, size) of their own.

    Args:
        layout: of the parameters.
        dimensions: k = a b.
        seed: of the signs.
    """

    def __init__(self, layout: Layout, dimensions: int, seed: int) -> None:
        self._layout, self._seed = layout, seed
        self._first = next(a for a in range(math.isqrt(dimensions), 0, -1) if dimensions % a == 0)
        self._second = dimensions // self._first
        self._drawn: dict[str, tuple[Tensor, ...]] = {}

    def __call__(self, records: Sequence[LayerRecord], like: Tensor) -> Tensor:
        """The inner products (k, K, n) of all columns and rows of the records of a batch, in the precision of a tensor."""
        parts = [part for record in records for part in self._of_record(record, like)]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def _of_record(self, record: LayerRecord, like: Tensor) -> Iterator[Tensor]:
        pair = _whole_weight(record)
        if pair is None:
            yield self._explicit(record, like)
            return
        left, right = self._signs(pair.weight, like)
        output, inputs = (right, left) if pair.arrangement.inputs_first else (left, right)
        h, d = pair.inputs[0] @ inputs.T, pair.deltas[0] @ output.T  # (n, T, a or b), (K, n, T, b or a)
        both = h.mT @ d if pair.arrangement.inputs_first else d.mT @ h
        yield both.flatten(2).permute(2, 0, 1)
        if pair.bias in record.params:
            (own,) = self._signs(pair.bias, like)
            yield (pair.deltas[0].sum(2) @ own.T).permute(2, 0, 1)

    def _explicit(self, record: LayerRecord, like: Tensor) -> Tensor:
        """The projection of gradients as they are: of parameters that are used in several ways, or elementwise."""
        total = like.new_zeros(self._first * self._second, record.columns, record.rows)
        for rows in row_slices(record.rows, record.columns * sum(shape.numel() for shape in record.shapes.values())):
            for name, gradients in record.explicit(rows).items():
                vectors = gradients.flatten(2)
                factors = self._signs(name, like)
                if len(factors) == 1:
                    found = vectors @ factors[0].T
                else:
                    left, right = factors
                    found = (left @ vectors.unflatten(2, (left.shape[1], -1)) @ right.T).flatten(2)
                total[:, :, rows] += found.permute(2, 0, 1)
        return total

    def _signs(self, name: str, like: Tensor) -> tuple[Tensor, ...]:
        """P and R of a weight, or the signs of a parameter of one axis."""
        if name not in self._drawn:
            shape = self._layout.shapes[name]
            source = generator(self._seed, self._layout.names.index(name))
            sizes = [(self._first, shape[0]), (self._second, shape[1:].numel())]
            if len(shape) < 2:
                sizes = [(self._first * self._second, shape.numel())]
            self._drawn[name] = tuple(signs(size, source, like) for size in sizes)
        return self._drawn[name]


def _whole_weight(record: LayerRecord) -> FactorPairs | None:
    """The inputs and deltas of a weight that is one matrix as it lies; None of other parameters."""
    pairs = record.factor_pairs()
    if isinstance(pairs, str) or len(pairs) > 1:
        return None
    (pair,) = pairs
    shape = record.shapes[pair.weight]
    size = pair.inputs.shape[-1], pair.deltas.shape[-1]  # those of one group, which are smaller where there are several
    lies = pair.arrangement.inputs_first or pair.arrangement.order(record.params, pair.deltas.device) is None
    expected = (shape[0], shape[1:].numel()) if pair.arrangement.inputs_first else (shape[1:].numel(), shape[0])
    fits = len(shape) > 1 and size == expected and pair.deltas.shape[1:3] == (record.columns, record.rows)
    return pair if lies and fits and set(record.params) <= {pair.weight, pair.bias} else None

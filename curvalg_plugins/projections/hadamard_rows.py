"""A subsampled randomised Hadamard transform: gradients with random signs, transformed, of which some entries are kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvalg import LayerRecord, Layout, OptionError
from curvalg_plugins.projections.drawn_signs import generator, signs
from curvalg_plugins.projections.explicit_rows import row_slices

BITS = 6
"""Axes of up to 2⁶ are transformed by one matrix product: fewer passes over memory than sums and differences of pairs."""


class HadamardRows:
    """Some rows of H S g, with random signs S and the Hadamard matrix H of the next power of two.

    Args:
        layout: of the parameters.
        dimensions: k, of at most as many rows as there are.
        seed: of the signs and of the choice of rows.

    Raises:
        OptionError: more dimensions than rows.
    """

    def __init__(self, layout: Layout, dimensions: int, seed: int) -> None:
        self._layout, self._size = layout, 1 << (layout.size - 1).bit_length()
        if dimensions > self._size:
            raise OptionError(
                f"kind='srht' keeps some of {self._size} numbers, the next power of two of {layout.size} parameters, but "
                f"{dimensions} dimensions were asked for; take fewer, or kind='dense'"
            )
        source = generator(seed, 0)
        self._signs = signs((layout.size,), source, torch.empty(0, dtype=torch.int8, device="cpu"))
        self._rows = torch.randperm(self._size, generator=source, device="cpu")[:dimensions]

    def __call__(self, records: Sequence[LayerRecord], like: Tensor) -> Tensor:
        """The kept entries (k, K, n) of all columns and rows of the records of a batch, in the precision of a tensor."""
        columns, count = records[0].columns, records[0].rows
        flips, kept = self._signs.to(like.device, like.dtype), self._rows.to(like.device)
        result = like.new_zeros(len(kept), columns, count)
        for rows in row_slices(count, columns * self._size):
            vectors = like.new_zeros(columns * (rows.stop - rows.start), self._size)
            for record in records:
                for name, gradients in record.explicit(rows).items():
                    vectors[:, self._layout.slices[name]] = gradients.flatten(0, 1).flatten(1)
            vectors[:, : len(flips)] *= flips
            result[:, :, rows] = transformed(vectors)[:, kept].reshape(columns, -1, len(kept)).permute(2, 0, 1)
        return result


def transformed(vectors: Tensor) -> Tensor:
    """Products H x of the Hadamard matrix H, of entries ±1, with rows x (n, 2ᵐ)."""
    count, size = vectors.shape
    bits, right = size.bit_length() - 1, 1
    while right < size:
        axis = 1 << min(BITS, bits - (right.bit_length() - 1))
        matrix, left = hadamard(axis, vectors), size // (axis * right)
        vectors = (
            vectors.reshape(-1, axis) @ matrix if right == 1 else matrix @ vectors.reshape(count * left, axis, right)
        )
        right *= axis
    return vectors.reshape(count, size)


def hadamard(size: int, like: Tensor) -> Tensor:
    """The Hadamard matrix of a power of two: the sign of entry i, j is that of the number of ones in i & j."""
    matrix = like.new_ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix

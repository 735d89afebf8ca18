"""A projection by independent signs, of which a few columns exist at a time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from curvalg import LayerRecord, Layout
from curvalg_plugins.projections.drawn_signs import generator, signs

WIDTH = 64
"""Directions of the parameters' size that exist at a time."""


class DenseSigns:
    """Inner products of gradients with k vectors of independent signs, drawn anew for every batch.

    Args:
        layout: of the parameters.
        dimensions: k.
        seed: of the signs.
    """

    def __init__(self, layout: Layout, dimensions: int, seed: int) -> None:
        self._layout, self._dimensions, self._seed = layout, dimensions, seed

    def __call__(self, records: Sequence[LayerRecord], like: Tensor) -> Tensor:
        """The inner products (k, K, n) of all columns and rows of the records of a batch, in the precision of a tensor."""
        total = like.new_zeros(self._dimensions, records[0].columns, records[0].rows)
        for at in range(0, self._dimensions, WIDTH):
            directions = self._directions(at, min(at + WIDTH, self._dimensions), like)
            for record in records:
                total[at : at + WIDTH] += record.project(directions)
        return total

    def _directions(self, start: int, stop: int, like: Tensor) -> dict[str, Tensor]:
        """Signs by the names of parameters, (stop - start, *shape)."""
        layout = self._layout
        drawn = signs((stop - start, layout.size), generator(self._seed, start), like)
        return {name: drawn[:, at].reshape(-1, *layout.shapes[name]) for name, at in layout.slices.items()}

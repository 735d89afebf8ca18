"""Random vectors of which each number belongs to its place in the whole vector, whichever process holds it.

They are drawn in tiles, each by a generator of its own that is seeded by a hash of (key, number of the vector, number of the
tile). So a process that holds a part of a vector draws the tiles that it has a part of, and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TILE = 4096
"""Numbers of a tile: as many as make the seeding cheap beside them, and few enough that little is drawn for others."""

Fill = Callable[[Tensor, torch.Generator], object]
"""Fills a float32 tile on the CPU with random numbers."""


def normal(tile: Tensor, generator: torch.Generator) -> None:
    """Fill a tile with standard normal numbers."""
    tile.normal_(generator=generator)


def bits(tile: Tensor, generator: torch.Generator) -> None:
    """Fill a tile with numbers 0 and 1, which are equally likely."""
    tile.random_(0, 2, generator=generator)


def draw(rows: Tensor, key: str, start: int, size: int, pieces: Sequence[tuple[int, int]], fill: Fill) -> Tensor:
    """Fill rows with what a process holds of random vectors.

    Args:
        rows: float32 on the CPU, contiguous (m, numbers of all pieces); they are written into.
        key: of the sequence of vectors; different keys give independent sequences.
        start: number of the first row in that sequence.
        size: numbers of a whole vector.
        pieces: runs (first place in the whole vector, length) that lie one after the other in a row.
        fill: the distribution.

    Returns:
        The rows.
    """
    generator, buffer = torch.Generator(device="cpu"), torch.empty(TILE, device="cpu")
    cuts = _cut(pieces)
    # Tile by tile, so that each is drawn once, however many pieces it has.
    order = sorted(range(len(cuts)), key=lambda i: cuts[i][0])
    lengths = [length for _, length in cuts]
    for number, row in enumerate(rows, start):
        views, drawn = row.split(lengths), -1
        for i in order:
            place, length = cuts[i]
            index, first = divmod(place, TILE)
            width = min(TILE, size - index * TILE)
            if index != drawn:
                # Neighbouring seeds of the generator would do, were it not for users who take neighbouring seeds themselves.
                name = hashlib.blake2b(f"{key} {number} {index}".encode(), digest_size=8).digest()
                generator.manual_seed(int.from_bytes(name, "little") >> 1)
                if length == width:
                    fill(views[i], generator)
                    continue
                drawn = index
                fill(buffer[:width], generator)
            views[i].copy_(buffer[first : first + length])
    return rows


def _cut(pieces: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pieces, cut where tiles end: (place in the whole vector, length)."""
    cut = []
    for place, length in pieces:
        end = place + length
        while place < end:
            here = min(end, (place // TILE + 1) * TILE) - place
            cut.append((place, here))
            place += here
    return cut

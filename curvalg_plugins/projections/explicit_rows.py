"""Gradients of single samples as they are, of a few rows of a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator

LIMIT = 2**22
"""Numbers that exist at a time, unless a single row has more."""


def row_slices(rows: int, each: int) -> Iterator[slice]:
    """Rows of so many numbers each, one slice of them after the other."""
    width = max(1, LIMIT // max(1, each))
    for at in range(0, rows, width):
        yield slice(at, min(at + width, rows))

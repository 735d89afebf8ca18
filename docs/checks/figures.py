"""Fails where a picture of the built documentation is empty: ``python docs/checks/figures.py docs/_build/html``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

LEAST = 0.002
"""Share of pixels that must differ from the commonest colour: a few thin curves on white have ten times as many."""
DISTANCE = 24
"""Levels of 255, in any channel, by which a pixel differs from a colour."""


def ink(path: Path) -> float:
    """The share of pixels that are unlike the commonest colour; transparent ones are white."""
    with Image.open(path) as image:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        pixels = np.asarray(Image.alpha_composite(white, rgba).convert("RGB")).reshape(-1, 3).astype(np.int16)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    return float((np.abs(pixels - colours[counts.argmax()]).max(1) > DISTANCE).mean())


def pictures(built: Path) -> Iterator[Path]:
    """Every PNG that was made for the documentation, not those of themes."""
    return iter(sorted((built / "_images").rglob("*.png")))


def empty(built: Path) -> list[str]:
    """A line for every picture of nearly one colour."""
    return [f"{path}: {share:.2%} of it is drawn" for path in pictures(built) if (share := ink(path)) < LEAST]


def main(built: Path) -> int:
    """Print what is empty; the exit status."""
    found, count = empty(built), len(list(pictures(built)))
    if not count:
        found = [f"{built}: no pictures at all"]
    print(*found, f"{count} pictures, {len(found)} empty", sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

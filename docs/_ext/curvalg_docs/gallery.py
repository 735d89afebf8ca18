"""What sphinx-gallery is given, and in which order."""

from __future__ import annotations

from pathlib import Path

from curvalg_docs.files import write

FIRST = ("plot_first_products.py", "plot_eigenpairs.py", "plot_spectral_density.py")
"""Read in this order; all others follow by name."""


def by_difficulty(filename: str) -> tuple[int, str]:
    """The key that examples are sorted by."""
    return (FIRST.index(filename) if filename in FIRST else len(FIRST), filename)


def stage(gallery: Path, folder: Path) -> str:
    """Copy the examples, and they alone, to a folder; returns it.

    sphinx-gallery takes every folder that has a README for a section, and would run the plugin template.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = [gallery / "README.rst", *sorted(gallery.glob("plot_*.py"))]
    for old in set(folder.iterdir()) - {folder / source.name for source in sources}:
        if old.is_file():
            old.unlink()
    for source in sources:
        write(folder / source.name, source.read_text(encoding="utf-8"))
    return str(folder)

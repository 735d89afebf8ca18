"""The tables and pictures of benchmark results, where there are results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

MISSING = (
    "No results are stored in this checkout. `make benchmark` measures on your machine and writes "
    "`benchmarks/results/local.json`; the next build of this page shows it.\n"
)


def results(folder: Path) -> list[Path]:
    """The files of results."""
    return sorted((folder / "results").glob("*.json"))


def of_device(path: Path) -> bool:
    """Whether a file of results is one of ``python -m benchmarks.device``, which tells its own kind."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:  # said by the suite that is asked to read it
        return False
    return isinstance(read, dict) and read.get("kind") == "device"


CAPTIONS = {
    "products-hessian": "A Hessian product, in multiples of one gradient",
    "products-ggn": "A GGN product, in multiples of one gradient",
    "products-covariance": "A product with the gradient covariance, in multiples of one gradient",
    "products-sum": "A product with the sum of the three, in multiples of one gradient",
    "columns": "Products with several vectors, in multiples of one gradient a column",
    "memory": "Peak memory of a first product, in multiples of that of a gradient",
}


def tables(folder: Path, pictures: Path) -> str:
    """Every picture and table of every file of results, as Markdown; how to get some where there are none.

    Args:
        folder: the folder ``benchmarks`` of the checkout.
        pictures: where pictures are drawn, in a folder for each file; the page refers to them from two folders above.

    Raises:
        RuntimeError: the suite cannot read a file of results.
    """
    found = results(folder)
    if not found:
        return MISSING
    return "\n\n".join(f"## {path.stem}\n\n{_shown(path, folder, pictures / path.stem)}" for path in found)


def _shown(path: Path, folder: Path, pictures: Path) -> str:
    """Pictures and tables of one file; those of a device have tables alone."""
    if of_device(path):
        return _below(_suite(folder, "table", path, module="benchmarks.device"))
    return f"{_pictures(path, folder, pictures)}\n\n{_below(_suite(folder, 'table', path, '--all'))}"


def _suite(folder: Path, command: str, path: Path, *options: str, module: str = "benchmarks") -> str:
    """What the suite prints when it is asked about a file of results."""
    done = subprocess.run(
        [sys.executable, "-m", module, command, str(path), *options],
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"python -m {module} {command} {path.name} failed:\n{done.stderr}")
    return done.stdout


def _pictures(path: Path, folder: Path, to: Path) -> str:
    _suite(folder, "plot", path, "--to", str(to))
    place = "/".join(to.parts[-3:])
    drawn = [(name, caption) for name, caption in CAPTIONS.items() if (to / f"{name}.png").exists()]
    return "\n\n".join(f"![{caption}]({place}/{name}.png)\n\n*{caption}.*" for name, caption in drawn)


def _below(printed: str) -> str:
    """The suite's own headings become those below a file's."""
    return "\n".join(f"#{line}" if line.startswith("##") else line for line in printed.splitlines())

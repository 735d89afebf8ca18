"""The tables of benchmark results, where there are results."""

from __future__ import annotations

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


def tables(folder: Path) -> str:
    """Every table of every file of results, as Markdown; how to get some where there are none.

    Args:
        folder: the folder ``benchmarks`` of the checkout.

    Raises:
        RuntimeError: the suite cannot read a file of results.
    """
    found = results(folder)
    if not found:
        return MISSING
    return "\n\n".join(f"## {path.stem}\n\n{_table(path, folder)}" for path in found)


def _table(path: Path, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "table", str(path), "--all"],
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"python -m benchmarks table {path.name} failed:\n{done.stderr}")
    # The suite's own headings become those below this file's.
    return "\n".join(f"#{line}" if line.startswith("##") else line for line in done.stdout.splitlines())

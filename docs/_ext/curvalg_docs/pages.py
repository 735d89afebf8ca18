"""The Python blocks of hand-written pages: run in their order, one namespace for a page."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import torch

BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
FIGURES = ("start.md",)
"""Pages that save figures which they then show; they run at build time."""


def blocks(page: Path) -> list[str]:
    """The Python blocks of a page, each on the lines that it has there, so that a traceback points into the page."""
    text = page.read_text(encoding="utf-8")
    return ["\n" * (text[: match.start(1)].count("\n")) + match.group(1) for match in BLOCK.finditer(text)]


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run(page: Path, folder: Path) -> dict[str, Any]:
    """Run the blocks of a page in a folder; returns what they defined."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    module = ModuleType(f"page_{page.stem.replace('-', '_')}")  # a real one: classes of a page are pickled by its name
    namespace = vars(module)
    sys.modules[module.__name__] = module
    with torch.random.fork_rng(), _inside(folder):
        torch.manual_seed(0)
        for block in blocks(page):
            # Not under this module's own `from __future__ import annotations`.
            exec(compile(block, str(page), "exec", dont_inherit=True), namespace)
        plt.close("all")
    return namespace


def run_figures(docs: Path) -> None:
    """Run the pages that show their figures."""
    for name in FIGURES:
        with contextlib.redirect_stdout(io.StringIO()):  # what a page prints is not what a build has to say
            run(docs / name, docs / "_generated" / Path(name).stem)

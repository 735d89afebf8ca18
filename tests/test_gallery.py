"""Every page of the gallery runs from start to end; its own assertions are the test.

``make docs`` runs them all and fails where one does, as a part of what must pass before a change lands; here they run with
CURVALG_NIGHTLY=1, and the first of them always, as a script in a fresh interpreter.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

GALLERY = Path(__file__).parents[1] / "gallery"
PAGES = sorted(GALLERY.glob("plot_*.py"))
NIGHTLY = os.environ.get("CURVALG_NIGHTLY") == "1"
FIRST = "plot_first_products"


def test_the_gallery_is_not_empty() -> None:
    assert FIRST in [page.stem for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs(page: Path, tmp_path: Path) -> None:
    if not NIGHTLY and page.stem != FIRST:
        pytest.skip("make docs runs it")
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, str(page)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_fits_the_column_of_a_page(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    first = ast.parse(text).body[0]  # the docstring is prose, which flows on the page as comments do
    code = enumerate(text.splitlines()[first.end_lineno :], (first.end_lineno or 0) + 1)
    wide = [f"{page.name}:{n}" for n, line in code if len(line) > 88 and not line.lstrip().startswith("#")]
    assert wide == []

"""The Python blocks of every hand-written page run, in their order."""

from __future__ import annotations

from pathlib import Path

import pytest
from curvalg_docs import pages

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(
    page for page in DOCS.rglob("*.md") if not {"_build", "_generated", "_ext"} & set(page.relative_to(DOCS).parts)
)
WITHOUT = {"index", "laws", "strategies", "benchmarks", "changelog", "comparison", "glossary"}
"""Pages that are tables, and need no code."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_blocks_run(page, tmp_path):
    assert pages.blocks(page) or page.stem in WITHOUT
    pages.run(page, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_what_is_shown_is_checked(page):
    code = "\n".join(pages.blocks(page))
    assert not code or "assert " in code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_code_fits_the_page(page):
    wide = [line for block in pages.blocks(page) for line in block.splitlines() if len(line) > 88]
    assert not wide


def test_jobs_take_fifteen_lines(docs):
    _, *jobs = pages.blocks(docs / "howto" / "jobs.md")
    assert len(jobs) == 5
    assert all(len([line for line in job.strip().splitlines() if line.strip()]) <= 15 for job in jobs)


def test_a_block_that_fails_is_found_on_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nx = 1\nassert x == 2\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError) as caught:
        pages.run(page, tmp_path)
    assert caught.traceback[-1].lineno + 1 == 5


def test_figures_of_pages_are_written_where_the_page_looks(tmp_path, docs):
    for name in pages.FIGURES:
        pages.run(docs / name, tmp_path / Path(name).stem)
        text = (docs / name).read_text(encoding="utf-8")
        made = [path.relative_to(tmp_path).as_posix() for path in (tmp_path / Path(name).stem).iterdir()]
        assert made
        assert all(f"](_generated/{path})" in text for path in made)

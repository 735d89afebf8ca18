"""The page of ``curvalg report`` in a real browser, where there is one: nothing fails, nothing is fetched, everything is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import browser

pytestmark = pytest.mark.skipif(browser.find() is None, reason=browser.MISSING)

# A server that answers nothing is never asked: names do not resolve, and an address by number is refused at once.
FAULTY = """<!doctype html><html><body><p id="seen"></p>
<script>document.getElementById("seen").textContent = 6 * 7; console.error("broken " + "here"); missing();</script>
<img src="http://page.invalid/a.png"><link rel="stylesheet" href="http://127.0.0.1:9/a.css">
</body></html>"""

MEASURE = "<script>document.body.dataset.wide = document.documentElement.scrollWidth - innerWidth</script>"


@pytest.fixture
def written(run, tiny, tmp_path: Path) -> Path:
    """The file of the GGN's page."""
    result = run("report", "-p", tiny, "--out", "page.html", "--damping", 0.1, "--k", 3)
    assert result.exit_code == 0, result.stderr
    return tmp_path / "page.html"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """An empty folder for the browser."""
    folder = tmp_path / "browser"
    folder.mkdir()
    return folder


def test_the_browser_shows_every_section_and_asks_for_nothing(written: Path, work: Path) -> None:
    opened = browser.open_page(written, work)
    assert opened.console == ()
    assert opened.requests == ()
    text = written.read_text(encoding="utf-8")
    sections = re.findall(r"<h2[^>]*>(.*?)</h2>", text, re.DOTALL)
    assert len(sections) >= 4
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", opened.dom, re.DOTALL) == sections
    # A parser that met a fault would close tables and drawings early, and leave cells outside of them.
    for part in ("table", "tr", "td", "th", "svg", "path"):
        assert len(re.findall(rf"<{part}\b", opened.dom)) == len(re.findall(rf"<{part}\b", text)), part


@pytest.mark.parametrize("width", [1400, 500])
def test_the_page_is_not_wider_than_the_window(written: Path, work: Path, width: int) -> None:
    measured = written.with_name("measured.html")
    text = written.read_text(encoding="utf-8")
    measured.write_text(text.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    opened = browser.open_page(measured, work, width=width)
    found = re.search(r'data-wide="(-?\d+)"', opened.dom)
    assert found is not None
    assert int(found[1]) <= 0


def test_faults_of_a_page_are_found(tmp_path: Path, work: Path) -> None:
    page = tmp_path / "faulty.html"
    page.write_text(FAULTY, encoding="utf-8")
    opened = browser.open_page(page, work)
    assert ">42<" in opened.dom
    assert any("broken here" in line for line in opened.console)
    assert any("missing is not defined" in line for line in opened.console)
    assert opened.requests == ("http://127.0.0.1:9/a.css", "http://page.invalid/a.png")

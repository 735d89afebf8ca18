"""``curvalg report``: one page with the library's numbers, well-formed, which needs nothing from anywhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from curvalg import parse


class Cells(HTMLParser):
    """The rows of all tables of a page as text, the headings, and every address that it names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self.addresses: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        if tag == "tr":
            self.rows.append([])
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("td", "th"):
            self.rows[-1].append(data)
        elif self._inside == "h2":
            self.headings.append(data)


def number_in(rows: list[list[str]], name: str, column: int = 1) -> float:
    return float(next(row for row in rows if row and row[0] == name)[column])


@pytest.fixture
def written(run, tiny, tmp_path: Path) -> str:
    """The page of the GGN."""
    result = run("report", "-p", tiny, "--out", "page.html", "--damping", 0.1, "--k", 3)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "page: page.html\n"
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_numbers_are_those_of_the_dense_matrix(written: str, tiny_problem) -> None:
    A, page = parse("ggn").lower(tiny_problem).to_dense().numpy(), Cells(written)
    values = np.linalg.eigvalsh(A)
    assert number_in(page.rows, "loss") == pytest.approx(tiny_problem.value(), rel=1e-5)
    assert number_in(page.rows, "trace") == pytest.approx(values.sum(), rel=1e-5)
    assert number_in(page.rows, "effective dimension, λ = 0.1") == pytest.approx(
        (values / (values + 0.1)).sum(), rel=1e-5
    )
    assert [number_in(page.rows, str(n)) for n in (1, 2, 3)] == pytest.approx(values[:-4:-1].tolist(), rel=1e-5)
    for name, where in tiny_problem.layout.slices.items():
        assert number_in(page.rows, name, 3) == pytest.approx(A.diagonal()[where].mean(), rel=1e-3)
    assert [row[0] for row in page.rows if len(row) == 2 and "exact" in row[1]], "what it cost"


def test_the_page_needs_nothing_from_anywhere(written: str) -> None:
    page = Cells(written)
    assert page.addresses, "figures refer to their own parts, and hold their pixels"
    assert all(re.match("#|data:image/png;base64,", address) for address in page.addresses)
    assert not re.search(r"url\((?!#)|@import|<script|<link", written)


def test_figures_are_svg_of_their_own(written: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", written, re.DOTALL)
    assert len(drawings) == 2
    names = [
        {node.get("id") for node in ElementTree.fromstring(text).iter() if "clip" in node.tag.lower()}
        for text in drawings
    ]
    assert all(names) and not names[0] & names[1], "names of one figure mean nothing in the other"


def test_the_same_numbers_give_the_same_page(run, tiny, tmp_path: Path, written: str) -> None:
    assert run("report", "-p", tiny, "--out", "again.html", "--damping", 0.1, "--k", 3).exit_code == 0
    without_clock = [
        re.sub(r"[\d.]+ s\b", "", text) for text in (written, (tmp_path / "again.html").read_text(encoding="utf-8"))
    ]
    assert without_clock[0] == without_clock[1]


def test_an_indefinite_matrix_has_no_effective_dimension_and_the_reason(run, tiny, tmp_path: Path) -> None:
    result = run("report", "hessian - 2*ggn", "-p", tiny, "--out", "page.html")
    assert result.exit_code == 0, result.stderr
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "no effective dimension: " in page and "semidefinite" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "page.pdf"], "ends in .html, got 'page.pdf'; write page.html"),
        (["--out", "missing/page.html"], "the report cannot be written to missing/page.html"),
        ([], "--out"),
    ],
)
def test_pages_refused_before_anything_is_computed(
    run, module, tmp_path: Path, options: list[str], message: str
) -> None:
    name = module("def make():\n    open('computed', 'w').close()")
    result = run("report", "-p", f"{name}:make", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "computed").exists()


def test_what_is_not_symmetric_is_refused(run, tiny) -> None:
    result = run("report", "hessian @ ggn", "-p", tiny, "--out", "page.html")
    assert result.exit_code == 2 and "symmetric" in result.stderr

"""The checks of the built pages find what they are for."""

from __future__ import annotations

import subprocess
import sys

import figures
import links
import pytest
import stubs
from matplotlib.figure import Figure
from PIL import Image

from curvalg import registry


@pytest.fixture
def built(tmp_path):
    """A small site without a fault."""
    (tmp_path / "_images").mkdir()
    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([0, 1], [0, 1])
    figure.savefig(tmp_path / "_images" / "curve.png")
    (tmp_path / "index.html").write_text(
        '<h1 id="top">A</h1><a href="sub/page.html#part">x</a><a href="#top">y</a><img src="_images/curve.png">'
        '<a href="https://example.org/nowhere">z</a>',
        encoding="utf-8",
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "page.html").write_text('<p id="part"><a href="../index.html">back</a></p>', encoding="utf-8")
    return tmp_path


def test_a_site_without_fault_passes(built):
    assert figures.main(built) == 0
    assert links.main(built) == 0


@pytest.mark.parametrize("colour", ["white", "black", (12, 200, 3), (0, 0, 0, 0)])
def test_a_planted_picture_of_one_colour_is_found(built, colour):
    Image.new("RGBA", (200, 100), colour).save(built / "_images" / "planted.png")
    assert figures.main(built) == 1
    (line,) = figures.empty(built)
    assert "planted.png" in line


def test_a_planted_picture_of_nearly_one_colour_is_found(built):
    image = Image.new("RGB", (200, 100), "white")
    for x in range(20):
        image.putpixel((x, 3), (250, 250, 250))
    image.putpixel((5, 5), (0, 0, 0))
    image.save(built / "_images" / "planted.png")
    assert "planted.png" in figures.empty(built)[0]


def test_axes_without_a_curve_are_not_taken_for_a_picture_of_one_colour(built):
    figure = Figure(figsize=(3, 2))
    figure.subplots()
    figure.savefig(built / "_images" / "axes.png")
    assert not figures.empty(built)  # a frame is drawn; what is inside is for the gallery's own assertions


def test_no_pictures_at_all_are_a_fault(tmp_path):
    assert figures.main(tmp_path) == 1


@pytest.mark.parametrize(
    ("html", "said"),
    [
        ('<a href="gone.html">x</a>', "gone.html: there is no such file"),
        ('<img src="_images/gone.png">', "_images/gone.png: there is no such file"),
        ('<a href="sub/page.html#gone">x</a>', "#gone: there is no such anchor"),
        ('<a href="#gone">x</a>', "#gone: there is no such anchor"),
    ],
)
def test_a_planted_dead_link_is_found(built, html, said):
    (built / "planted.html").write_text(html, encoding="utf-8")
    assert links.main(built) == 1
    (line,) = links.dead(built)
    assert line.startswith("planted.html: ")
    assert line.endswith(said)


def test_no_pages_at_all_are_a_fault(tmp_path):
    assert links.main(tmp_path) == 1


def test_editors_know_the_options_of_every_term():
    assert stubs.STUB.read_text(encoding="utf-8") == stubs.stub(), "run `python docs/checks/stubs.py`"
    ours = [name for name in registry.names() if registry.spec(name).distribution == "curvalg"]
    assert stubs.stub().count("@overload") == len(ours) + 1 > 20


def test_a_checker_accepts_what_the_registry_takes(tmp_path):
    """And takes what it gives for an expression."""
    code = tmp_path / "code.py"
    code.write_text(
        "from curvalg import Expr, registry\n"
        "a: Expr = registry.build('kfac', fisher='mc', samples=2)\n"
        "b: Expr = registry.build('some-package/some_term', width=3) + a\n"
        "c: int = registry.build('ggn')\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", str(code)],
        cwd=stubs.STUB.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "code.py:4: error" in done.stdout and done.stdout.count("error:") == 1, done.stdout

"""The checks of the built pages find what they are for."""

from __future__ import annotations

import figures
import links
import pytest
from matplotlib.figure import Figure
from PIL import Image


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

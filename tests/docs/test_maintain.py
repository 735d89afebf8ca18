"""The picture of the architecture is of the imports, and pages for maintainers name files that exist."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import draw
import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs" / "maintain").glob("*.md")), ROOT / "CONTRIBUTING.md"]
PLACES = (
    "",
    "curvalg",
    "tests",
    "curvalg_plugins",
    "curvalg/lowering",
    "curvalg/lowering/inverses",
    "curvalg/problem/layers",
)
"""Folders that pages name files from."""


def test_only_the_declared_doors_lead_up():
    house = draw.read()
    assert draw.upward(house.floors, house.between) <= draw.contract()[1]


def test_every_floor_and_every_room_is_drawn():
    house = draw.read()
    package = ROOT / "curvalg"
    floors = {floor for row in house.floors for floor in row}
    assert floors == {
        path.stem for path in package.iterdir() if path.stem not in ("__init__", "__main__", "__pycache__", "py")
    }
    assert floors == {*draw.WHAT}
    for floor, rows in house.rooms.items():
        rooms = {path.stem for path in (package / floor).iterdir() if path.stem not in ("__init__", "__pycache__")}
        assert {room for row in rows for room in row} == rooms


def test_rooms_stand_above_what_they_import():
    arrows = {("a", "b"): 1, ("b", "c"): 1, ("a", "c"): 1, ("d", "c"): 1}
    rows = draw.storeys("abcd", arrows)
    assert rows == (("a",), ("b", "d"), ("c",))
    assert not draw.upward(rows, arrows)
    assert draw.needed(rows, arrows) == {("a", "b"), ("b", "c"), ("d", "c")}


def test_a_planted_cycle_is_an_arrow_up():
    arrows = {("a", "b"): 3, ("b", "c"): 2, ("c", "a"): 1}
    rows = draw.storeys("abc", arrows)
    assert rows == (("a",), ("b",), ("c",))
    assert draw.upward(rows, arrows) == {("c", "a")}


PICTURE = (ROOT / "docs" / "images" / "architecture.svg").read_text(encoding="utf-8")


def test_the_picture_is_current():
    assert draw.described(draw.read()) in PICTURE, (
        "the imports have changed: python docs/checks/draw.py docs/images/architecture.svg, and look at it"
    )


def test_the_picture_carries_what_it_shows(tmp_path):
    draw.draw(draw.read(), tmp_path / "drawn.svg")
    assert draw.described(draw.read()) in (tmp_path / "drawn.svg").read_text(encoding="utf-8")


def test_a_planted_import_changes_the_picture():
    house = draw.read()
    assert draw.described(replace(house, between=house.between | {("errors", "cli")})) not in PICTURE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_are_named_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    named = re.findall(r"`([\w./-]+(?:\.py|\.md|\.toml|/))`", text)
    siblings = [
        f"curvalg/{name.rpartition('/')[0]}" for name in named
    ]  # a file named beside its neighbour in another folder
    gone = [n for n in named if not any((ROOT / place / n).exists() for place in (*PLACES, *siblings, *_folders()))]
    assert not gone


def _folders() -> list[str]:
    """Where a file may be that is named by itself."""
    return ["curvalg/estimate", "curvalg/problem/layers/kinds", "curvalg/rewrite/rules", "curvalg/losses/closed_forms"]

"""Draws the floors and rooms of the package from its imports: ``python docs/checks/draw.py docs/images/architecture.svg``."""

from __future__ import annotations

import sys
import tomllib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.counts import doors, imports, modules  # noqa: E402

INK, MUTED, LINE, RED = "#1f2430", "#5b6270", "#8a8f9c", "#c0392b"
BAND, HOUSE, ROOM = "#f4f1ea", "#e8f1fb", "#ffffff"
WITH_ROOMS = ("problem", "lowering")
"""Floors that are drawn with the rooms inside."""
WHAT = {
    "testing": "conformance kit",
    "markup": "HTML of notebooks",
    "cli": "command line",
    "integrations": "other libraries",
    "files": "expressions and results in files",
    "differentiable": "curvature with gradients",
    "estimate": "spectra, traces and functions, each with its error",
    "lowering": "from an expression and a problem to an operator",
    "runs": "checkpoints and resuming",
    "planning": "memory, traffic and work before a run",
    "solve": "CG, MINRES, Lanczos, quadrature",
    "problem": "model, loss and data at one state, and what is kept of them",
    "losses": "closed forms in output space",
    "registry": "names → terms",
    "rewrite": "laws and their engine",
    "expr": "immutable expressions, facts, printing",
    "distributed": "exchanges between processes",
    "tensors": "helpers of torch",
    "errors": "every exception",
}
"""What is on a floor."""
Arrow = tuple[str, str]
Rows = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class House:
    """What the imports say.

    Args:
        floors: from top to bottom, those side by side in one row.
        between: (floor that imports, floor that is imported).
        rooms: floor -> its rooms from top to bottom.
        inside: floor -> (room that imports, room that is imported).
    """

    floors: Rows
    between: frozenset[Arrow]
    rooms: Mapping[str, Rows]
    inside: Mapping[str, frozenset[Arrow]]


def contract() -> tuple[Rows, set[Arrow]]:
    """The floors of the import contract from top to bottom, and the doors that may lead up."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        layers = tomllib.load(file)["tool"]["importlinter"]["contracts"][0]
    floors = tuple(tuple(part.strip(" ()").split(".")[1] for part in row.split("|")) for row in layers["layers"])
    return floors, {(a.split(".")[1], b.split(".")[1]) for a, b in doors()}


def read() -> House:
    """The house as it stands."""
    known, (floors, _) = modules(), contract()
    names = {name for row in floors for name in row}
    between: set[Arrow] = set()
    inside: dict[str, Counter[Arrow]] = {floor: Counter() for floor in WITH_ROOMS}
    for module, path in known.items():
        floor, room = _place(module)
        for other in imports(module, path, known):
            other_floor, other_room = _place(other)
            if floor != other_floor and {floor, other_floor} <= names:
                between.add((floor, other_floor))
            elif floor == other_floor and floor in inside and room and other_room and room != other_room:
                inside[floor][room, other_room] += 1
    rooms = {floor: {room for m in known for f, room in [_place(m)] if f == floor and room} for floor in WITH_ROOMS}
    return House(
        floors,
        frozenset(between),
        {floor: storeys(rooms[floor], inside[floor]) for floor in WITH_ROOMS},
        {floor: frozenset(inside[floor]) for floor in WITH_ROOMS},
    )


def _place(module: str) -> tuple[str, str]:
    """(floor, room) of a module; a package as such, which only shows names, is no room."""
    _, floor, room, *_ = [*module.split("."), "", ""]
    return floor, room


def storeys(rooms: Collection[str], arrows: Mapping[Arrow, int]) -> Rows:
    """Rooms from top to bottom, each above all that it imports but where they import each other.

    Args:
        rooms: their names.
        arrows: (room that imports, room that is imported) -> how often.
    """
    height: dict[str, int] = {}
    while left := sorted(set(rooms) - set(height)):
        missing = {r: sum(n for (a, b), n in arrows.items() if a == r and b in left) for r in left}
        # In a cycle the room that lacks the fewest imports goes first.
        placed = [r for r in left if missing[r] == min(missing.values())]
        placed = placed if min(missing.values()) == 0 else placed[:1]
        height |= {r: 1 + max((height[b] for a, b in arrows if a == r and b in height), default=-1) for r in placed}
    return tuple(tuple(r for r in sorted(height) if height[r] == h) for h in range(max(height.values()), -1, -1))


def upward(rows: Rows, arrows: Collection[Arrow]) -> set[Arrow]:
    """Arrows that do not lead down."""
    depth = {name: i for i, row in enumerate(rows) for name in row}
    return {(a, b) for a, b in arrows if depth[a] >= depth[b]}


def needed(rows: Rows, arrows: Collection[Arrow]) -> set[Arrow]:
    """Arrows that lead down and do not follow from others: of a → b → c and a → c the last one does."""
    down = set(arrows) - upward(rows, arrows)
    reach = {name: {name} for row in rows for name in row}
    for row in reversed(rows):
        for a in row:
            reach[a] |= {c for x, b in down if x == a for c in reach[b]}
    return {(a, b) for a, b in down if not any(x == a and c != b and b in reach[c] for x, c in down)}


def described(house: House) -> str:
    """All floors, rooms and arrows in words, which the picture carries: other versions of matplotlib draw other bytes."""
    arrows = {"": house.between, **house.inside}
    rows = {"": house.floors, **house.rooms}
    parts = [f"{floor} {' / '.join(' '.join(row) for row in rows[floor])}" for floor in rows]
    parts += [f"{floor} {' '.join(f'{a}.{b}' for a, b in sorted(arrows[floor]))}" for floor in arrows]
    return "; ".join(parts).strip()


# -- the picture --------------------------------------------------------------------------------------------------------

WIDTH, PLAIN, STOREY, TALL, HEAD, GAP = 100.0, 5.0, 6.3, 4.0, 6.4, 2.0
"""Of the picture, of a floor without rooms, of a row of rooms, of a room, of the line above them, and between floors."""
MARGIN, STEP = 13.0, 3.4
"""Of the picture on the right, and between the doors there."""
DOORS = {"lowering": "Expr.lower", "rewrite": "Expr.simplify", "problem": "names of types"}
"""What leads up to a floor."""


def draw(house: House, path: Path) -> None:
    """Write the picture as SVG; the same bytes whenever it is drawn of the same house."""
    heights = [_height(house, row) for row in house.floors]
    total = sum(heights) + GAP * (len(heights) - 1)
    with matplotlib.rc_context({"svg.hashsalt": "curvalg", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(9.0, 9.0 * (total + 2) / (WIDTH + MARGIN + 1)))
        figure.patch.set_facecolor("white")
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set_xlim(-1, WIDTH + MARGIN)
        ax.set_ylim(-1, total + 1)
        ax.axis("off")
        top, middles = total, dict[str, float]()
        for row, height in zip(house.floors, heights, strict=True):
            share = (WIDTH - GAP * (len(row) - 1)) / len(row)
            for i, floor in enumerate(row):
                _floor(ax, house, floor, i * (share + GAP), top - height, share, height)
                middles[floor] = top - height / 2
            top -= height + GAP
        up = sorted(upward(house.floors, house.between), key=lambda pair: -middles[pair[1]])
        for i, (a, b) in enumerate(up):
            _door(ax, WIDTH + STEP * (len(up) - i), middles[a] - 1.2 + 1.2 * i, middles[b], DOORS.get(b, f"{a} → {b}"))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None, "Description": described(house)})


def _height(house: House, row: tuple[str, ...]) -> float:
    return max(HEAD + STOREY * len(house.rooms[floor]) if floor in house.rooms else PLAIN for floor in row)


def _box(ax: Axes, x: float, y: float, width: float, height: float, colour: str, level: int = 1) -> None:
    style = "round,pad=0,rounding_size=0.8"
    ax.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle=style, facecolor=colour, edgecolor=INK, linewidth=0.8, zorder=level
        )
    )


def _floor(ax: Axes, house: House, floor: str, x: float, y: float, width: float, height: float) -> None:
    _box(ax, x, y, width, height, HOUSE if floor in house.rooms else BAND)
    line = y + height - (3.2 if floor in house.rooms else height / 2)
    ax.text(x + 1.6, line, floor, fontsize=12, fontweight="bold", color=INK, va="center")
    ax.text(x + 3.4 + 1.25 * len(floor), line, WHAT[floor], fontsize=10, color=MUTED, va="center")
    if floor in house.rooms:
        _rooms(ax, house.rooms[floor], house.inside[floor], x, y, width)


def _rooms(ax: Axes, rows: Rows, arrows: Collection[Arrow], x: float, y: float, width: float) -> None:
    at: dict[str, tuple[float, float]] = {}
    for i, row in enumerate(reversed(rows)):
        slot = width / len(row)
        for j, room in enumerate(row):
            wide = 3.6 + 1.6 * len(room)
            # Rooms that are alone on their storey stand in three columns, so that few arrows pass behind a room.
            centre = x + (slot * (j + 0.5) if len(row) > 1 else width * (0.5, 0.24, 0.76)[i % 3])
            at[room] = centre, y + 1.4 + STOREY * i
            _box(ax, centre - wide / 2, at[room][1], wide, TALL, ROOM, level=3)
            middle = at[room][1] + TALL / 2
            ax.text(centre, middle, room, fontsize=10.5, color=INK, ha="center", va="center", zorder=4)
    for a, b in sorted(needed(rows, arrows)):
        _arrow(ax, at[a], (at[b][0], at[b][1] + TALL), LINE, 0.9)
    for a, b in sorted(upward(rows, arrows)):
        _arrow(ax, (at[a][0] + 1.5, at[a][1] + TALL), (at[b][0] + 1.5, at[b][1]), RED, 1.4)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, width: float) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0, "zorder": 2}
    ax.add_patch(FancyArrowPatch(start, end, color=colour, linewidth=width, **style))


def _door(ax: Axes, x: float, low: float, high: float, label: str) -> None:
    ax.plot([WIDTH, x, x], [low, low, high], color=RED, linewidth=1.3, zorder=2)
    _arrow(ax, (x, high), (WIDTH, high), RED, 1.3)
    ax.text(x + 0.4, max((low + high) / 2, low + 9), label, fontsize=8.5, color=RED, rotation=90, va="center")


if __name__ == "__main__":
    draw(read(), Path(sys.argv[1]))

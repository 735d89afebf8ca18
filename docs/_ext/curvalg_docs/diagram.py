"""The diagram of the concepts page: from an expression and a problem to an operator."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, MUTED = "#1f2430", "#5b6270"
YOURS, OURS, RESULT = "#e8f1fb", "#f4f1ea", "#e7f5ec"
"""What you write, what curvalg does, what you get."""


def _box(
    ax: Axes, x: float, y: float, width: float, title: str, lines: list[str], colour: str, height: float = 1.3
) -> None:
    ax.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=colour,
            edgecolor=INK,
            linewidth=0.9,
        )
    )
    ax.text(
        x + width / 2, y + height - 0.3, title, ha="center", va="center", fontsize=11.5, fontweight="bold", color=INK
    )
    for number, line in enumerate(lines):
        ax.text(
            x + width / 2, y + height - 0.66 - 0.28 * number, line, ha="center", va="center", fontsize=9, color=MUTED
        )


def _arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], label: str = "", above: float = 0.16
) -> None:
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=INK, linewidth=1.1, shrinkA=0, shrinkB=0)
    )
    if label:
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + above)
        ax.text(*middle, label, ha="center", va="bottom", fontsize=9, color=INK, style="italic")


def draw(path: Path) -> None:
    """Write the diagram as SVG; the same bytes whenever it is drawn."""
    with matplotlib.rc_context({"svg.hashsalt": "curvalg", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(9.0, 4.25))
        figure.patch.set_facecolor("white")
        ax = figure.add_axes((0.005, 0.01, 0.99, 0.98))
        ax.set_xlim(0, 13.6)
        ax.set_ylim(0, 6.1)
        ax.axis("off")
        _box(ax, 0.2, 4.3, 2.9, "registry", ["names → terms", "built-in and plugins"], YOURS)
        _box(ax, 0.2, 2.3, 2.9, "expression", ["2*ggn + 1e-3*identity", "knows no model, no data"], YOURS)
        _box(ax, 0.2, 0.3, 2.9, "problem", ["model, loss, data", "one normalisation"], YOURS)
        _box(ax, 4.1, 2.3, 2.5, "laws", ["exact equalities", "always applied"], OURS)
        _box(ax, 7.3, 2.3, 2.6, "plan", ["sweeps over the data,", "structured forms"], OURS)
        _box(ax, 7.3, 4.3, 2.6, "strategies", ["how an inverse is solved,", "or why not"], OURS)
        _box(ax, 4.1, 4.3, 2.5, "facts", ["symmetric, PSD, PD:", "yes, no or unknown"], OURS)
        _box(ax, 10.7, 2.3, 2.7, "operator", ["a SciPy LinearOperator", "op @ v, op.explain()"], RESULT)
        _box(ax, 10.7, 4.3, 2.7, "solves", ["with residuals", "exact where structured"], RESULT)
        _box(ax, 10.7, 0.3, 2.7, "estimates", ["spectra, traces, …", "with errors, resumable"], RESULT)
        _box(ax, 7.3, 0.3, 2.6, "recordings", ["linearisations, layers,", "kept within a budget"], OURS)
        _arrow(ax, (1.65, 4.3), (1.65, 3.6))
        ax.text(1.75, 3.95, "build", fontsize=9, style="italic", color=INK, va="center")
        _arrow(ax, (3.1, 2.95), (4.1, 2.95), "lower")
        _arrow(ax, (6.6, 2.95), (7.3, 2.95))
        _arrow(ax, (9.9, 2.95), (10.7, 2.95))
        _arrow(ax, (6.6, 4.95), (7.3, 4.95))
        _arrow(ax, (5.35, 3.6), (5.35, 4.3))
        _arrow(ax, (8.6, 4.3), (8.6, 3.6))
        _arrow(ax, (3.1, 0.95), (7.3, 0.95), "evaluated batch by batch")
        _arrow(ax, (8.6, 1.6), (8.6, 2.3))
        _arrow(ax, (12.05, 3.6), (12.05, 4.3))
        _arrow(ax, (12.05, 2.3), (12.05, 1.6))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})

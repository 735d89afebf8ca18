"""The picture of a matrix: its entries, and its eigenvalues or singular values."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import matplotlib
import torch
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from curvalg import CurvatureOperator, Layout
from curvalg_docs.problem import CLASSES, SAMPLES

INK, MUTED = "#1f2430", "#8a8f9c"
BELOW = 1e-12
"""Relative to the largest; smaller eigenvalues are rounding."""


def draw(op: CurvatureOperator, path: Path) -> None:
    """Write a PNG with the entries of an operator on the small problem, and its spectrum."""
    matrix = op.to_dense()
    with matplotlib.rc_context({"font.size": 8, "axes.edgecolor": MUTED, "axes.linewidth": 0.6}):
        figure = Figure(figsize=(7.2, 3.1), layout="constrained")
        heat, spectrum = figure.subplots(1, 2, width_ratios=(1.25, 1))
        image = heat.imshow(matrix.numpy(), cmap="RdBu_r", norm=_norm(matrix), interpolation="nearest", aspect="auto")
        decade = 10.0 ** math.floor(math.log10(float(matrix.abs().max())))
        ticks = [-decade, -decade / 10, -decade / 100, 0, decade / 100, decade / 10, decade]
        bar = figure.colorbar(image, ax=heat, fraction=0.05, pad=0.02, ticks=ticks)
        bar.ax.set_yticklabels([f"{tick:.0e}".replace("e-0", "e-") if tick else "0" for tick in ticks])
        bar.ax.minorticks_off()
        bar.ax.tick_params(labelsize=7)
        for axis, space in ((heat.yaxis, op.expr.codomain), (heat.xaxis, op.expr.domain)):
            edges, names = _groups(op.problem.layout, space)
            line = heat.axhline if axis is heat.yaxis else heat.axvline
            for edge in edges[1:-1]:
                line(edge - 0.5, color=INK, linewidth=0.4)
            axis.set_ticks([(a + b - 1) / 2 for a, b in pairwise(edges)], names)
        heat.tick_params(axis="x", rotation=30, length=0)
        heat.tick_params(axis="y", length=0)
        _spectrum(spectrum, matrix)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Software": None})


def draw_small(op: CurvatureOperator, path: Path) -> None:
    """Write a PNG of the entries alone, for the index."""
    matrix = op.to_dense()
    figure = Figure(figsize=(1.4, 1.4))
    ax = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    ax.imshow(matrix.numpy(), cmap="RdBu_r", norm=_norm(matrix), interpolation="nearest", aspect="auto")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(color=MUTED, linewidth=0.6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _norm(matrix: torch.Tensor) -> SymLogNorm:
    largest = float(matrix.abs().max())
    return SymLogNorm(linthresh=1e-3 * largest, vmin=-largest, vmax=largest)


def _groups(layout: Layout, space: str | None) -> tuple[list[int], list[str]]:
    """Edges and labels of the groups that rows or columns fall into."""
    if space == "outputs":
        each = SAMPLES // CLASSES * CLASSES
        return [each * c for c in range(CLASSES + 1)], [f"outputs,\nclass {c}" for c in range(CLASSES)]
    slices = [layout.slices[name] for name in layout.names]
    return [0, *(s.stop for s in slices)], list(layout.names)


def _spectrum(ax: matplotlib.axes.Axes, matrix: torch.Tensor) -> None:
    symmetric = matrix.shape[0] == matrix.shape[1] and bool(torch.allclose(matrix, matrix.T, atol=1e-10))
    values = torch.linalg.eigvalsh(matrix) if symmetric else torch.linalg.svdvals(matrix)
    values = values[values.abs().argsort(descending=True)]
    seen = values[values.abs() > BELOW * values.abs().max()]
    ranks = torch.arange(1, len(seen) + 1)
    for chosen, face, label in ((seen > 0, "#2b6cb0", "positive"), (seen < 0, "none", "negative")):
        if bool(chosen.any()):
            ax.plot(
                ranks[chosen],
                seen[chosen].abs(),
                "o",
                color="#2b6cb0",
                markerfacecolor=face,
                markersize=3.2,
                label=label,
            )
    if bool((seen < 0).any()):
        ax.legend(frameon=False)
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlabel(f"rank ({len(seen)} of {len(values)} above rounding)")
    ax.set_title("|eigenvalues|" if symmetric else "singular values", fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#e4e6eb", linewidth=0.6)
    ax.set_axisbelow(True)

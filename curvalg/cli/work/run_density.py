"""The command ``curvalg density``: how the eigenvalues of a symmetric operator are distributed."""

from __future__ import annotations

import json

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from curvalg.estimate import Density
from curvalg.lowering import CurvatureOperator

SHARES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
"""Quantiles in the table."""


def quantiles(density: Density) -> list[tuple[float, float]]:
    """Pairs (share, the least Ritz value or outlier with at least that share of all eigenvalues at or below it)."""
    points = sorted({*density.nodes.flatten().tolist(), *density.outliers.tolist()})
    found = []
    for share in SHARES:
        low, high = 0, len(points) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if density.cdf(points[middle]) >= share - 1e-12 else (middle + 1, high)
        found.append((share, points[low]))
    return found


def table(op: CurvatureOperator, density: Density, problem: str) -> Group:
    """Quantiles and outliers for people."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for column in ("share of eigenvalues", "at or below λ"):
        shown.add_column(column, justify="right")
    for share, value in quantiles(density):
        shown.add_row(f"{share:.0%}", f"{value:.4g}")
    title = Text(f"{op.expr} on {problem}, {op.shape[0]} x {op.shape[1]}", style="bold")
    lines: list[Table | Text] = [title, Text(), shown, Text()]
    if len(density.outliers):
        lines.append(Text("outliers: " + ", ".join(f"{value:.4g}" for value in density.outliers.flip(0).tolist())))
    return Group(*lines, Text(density.cost, style="dim"))


def as_json(op: CurvatureOperator, density: Density, *, problem: str, seed: int) -> str:
    """The curve as JSON for programs."""
    record = {
        "expression": str(op.expr),
        "problem": problem,
        "shape": list(op.shape),
        "scale": density.scale,
        "seed": seed,
        "grid": density.grid.tolist(),
        "density": density.density.tolist(),
        "lower": density.lower.tolist(),
        "upper": density.upper.tolist(),
        "outliers": density.outliers.tolist(),
        "width": density.width,
        "method": density.method,
        "products": density.products,
        "seconds": density.seconds,
        "partial": density.partial,
    }
    return json.dumps(record, indent=2)

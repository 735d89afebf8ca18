"""The command ``curvalg diagonal``: the diagonal of an operator, parameter by parameter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from curvalg.cli.written.operator_layout import layout_of
from curvalg.estimate import Estimate
from curvalg.lowering import CurvatureOperator


@dataclass(frozen=True)
class ParameterDiagonal:
    """The diagonal on one parameter.

    Args:
        name: of the parameter, or "outputs".
        size: its number of entries.
        least, mean, most: of the entries of the diagonal.
        share: of the sum of the whole diagonal.
        error: the largest standard error of its entries.
    """

    name: str
    size: int
    least: float
    mean: float
    most: float
    share: float
    error: float


def parts(op: CurvatureOperator, diagonal: Estimate) -> Iterator[ParameterDiagonal]:
    """The diagonal by parameters, in their order.

    Args:
        op: the operator.
        diagonal: of it.
    """
    value, error, layout = diagonal.value, diagonal.error, layout_of(op)
    assert isinstance(value, Tensor)
    assert isinstance(error, Tensor)
    total = float(value.sum())
    slices = {"outputs": slice(0, len(value))} if layout is None else layout.slices
    for name, where in slices.items():
        own = value[where]
        least, mean, most = (float(number) for number in (own.min(), own.mean(), own.max()))
        share = float(own.sum()) / total if total else 0.0
        yield ParameterDiagonal(name, len(own), least, mean, most, share, float(error[where].max()))


def table(op: CurvatureOperator, diagonal: Estimate, problem: str) -> Group:
    """The parameters as a table for people; errors where there are some."""
    estimated = diagonal.method != "exact"
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False)
    shown.add_column("parameter", overflow="fold")
    for column in ("entries", "min", "mean", "max", "share of trace", *(["largest error"] if estimated else [])):
        shown.add_column(column, justify="right")
    for part in parts(op, diagonal):
        cells = [f"{part.size:,}", *(f"{number:.4g}" for number in (part.least, part.mean, part.most))]
        shown.add_row(Text(part.name), *cells, f"{part.share:.1%}", *([f"± {part.error:.1e}"] if estimated else []))
    title = Text(f"diagonal of {op.expr} on {problem}, {op.shape[0]} x {op.shape[1]}", style="bold")
    return Group(title, Text(), shown, Text(), Text(diagonal.cost, style="dim"))


def as_json(op: CurvatureOperator, diagonal: Estimate, *, problem: str, seed: int) -> str:
    """The parameters for programs; the entries themselves go to the file of ``--out``."""
    record = {
        "expression": str(op.expr),
        "problem": problem,
        "shape": list(op.shape),
        "seed": seed,
        "parameters": [asdict(part) for part in parts(op, diagonal)],
        "method": diagonal.method,
        "products": diagonal.products,
        "seconds": diagonal.seconds,
        "converged": diagonal.converged,
        "partial": diagonal.partial,
    }
    return json.dumps(record, indent=2)

"""The command ``curvalg compare``: what one expression is on two problems, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from curvalg.estimate import Eigenpairs, Estimate, effective_dimension, eigsh, trace
from curvalg.lowering import CurvatureOperator


@dataclass(frozen=True)
class ComparedSide:
    """An expression on one of the problems.

    Args:
        problem: its name.
        op: the operator.
        loss: L(θ); None where the problem has none.
        pairs: the largest eigenvalues, with residuals.
        trace: with its standard error.
        dimension: the effective dimension; None where it was not asked for.
    """

    problem: str
    op: CurvatureOperator
    loss: float | None
    pairs: Eigenpairs
    trace: Estimate
    dimension: Estimate | None

    @property
    def partial(self) -> bool:
        """Whether something of it was interrupted."""
        return any(part.partial for part in (self.pairs, self.trace, self.dimension) if part is not None)


def side(
    op: CurvatureOperator,
    problem: str,
    *,
    k: int,
    damping: float | None,
    products: int | None,
    seed: int,
    progress: bool,
) -> ComparedSide:
    """Estimates of one operator.

    Args:
        op: the operator.
        problem: the name of its problem.
        k: number of eigenvalues.
        damping: λ of the effective dimension; None: it is left out.
        products: of trace and effective dimension each; None: what these choose.
        seed: of random vectors.
        progress: show it.

    Raises:
        FactsError: an operator that is not known to be symmetric, or with a damping not to be positive semi-definite.
    """
    common: dict[str, Any] = {"seed": seed, "progress": progress}
    effort = common if products is None else {**common, "products": products}
    return ComparedSide(
        problem,
        op,
        None if op.problem.loss is None else op.problem.value(),
        eigsh(op, k, which="LA", **common),
        trace(op, **effort),
        None if damping is None else effective_dimension(op, damping, **effort),
    )


def table(first: ComparedSide, second: ComparedSide, damping: float | None) -> Group:
    """Both as a table for people: a row for each number."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False)
    shown.add_column("")
    for one, letter in ((first, "A"), (second, "B")):
        shown.add_column(f"{letter}: {one.problem}", justify="right", overflow="fold")
    rows: dict[str, Callable[[ComparedSide], str]] = {
        "parameters": lambda one: f"{one.op.problem.size:,}",
        "loss": lambda one: "–" if one.loss is None else f"{one.loss:.6g}",
        "trace": lambda one: _estimate(one.trace),
    }
    if damping is not None:
        rows[f"effective dimension, λ = {damping:g}"] = lambda one: _estimate(one.dimension)
    for number in range(1, len(first.pairs) + 1):
        rows[f"eigenvalue {number}"] = lambda one, number=number: (  # type: ignore[misc]
            f"{float(one.pairs.eigenvalues[-number]):.6g}"
        )
    for name, cell in rows.items():
        shown.add_row(name, cell(first), cell(second))
    residual = max(float(one.pairs.residuals.max()) for one in (first, second))
    title = Text(f"{first.op.expr} on two problems", style="bold")
    return Group(title, Text(), shown, Text(), Text(f"residuals of eigenvalues at most {residual:.1e}", style="dim"))


def as_json(first: ComparedSide, second: ComparedSide, *, damping: float | None, seed: int) -> str:
    """Both for programs."""
    record = {
        "expression": str(first.op.expr),
        "damping": damping,
        "seed": seed,
        "sides": [_record(first), _record(second)],
    }
    return json.dumps(record, indent=2)


def _estimate(found: Estimate | None) -> str:
    if found is None:
        return "–"
    return f"{found.value:.6g}" + ("" if found.method == "exact" else f" ± {found.error:.2g}")


def _record(one: ComparedSide) -> dict[str, Any]:
    dimension = one.dimension
    return {
        "problem": one.problem,
        "shape": list(one.op.shape),
        "loss": one.loss,
        "eigenvalues": one.pairs.eigenvalues.flip(0).tolist(),
        "residuals": one.pairs.residuals.flip(0).tolist(),
        "trace": {"value": one.trace.value, "error": one.trace.error},
        "effective_dimension": None if dimension is None else {"value": dimension.value, "error": dimension.error},
        "partial": one.partial,
    }

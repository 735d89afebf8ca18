"""The command ``curvalg eigs``: a few eigenvalues of a symmetric operator, each with its true residual."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, TypeAlias

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from curvalg.estimate import Eigenpairs, eigsh
from curvalg.lowering import CurvatureOperator

End: TypeAlias = Literal["LA", "SA", "LM", "BE"]
"""Which end of the spectrum, as :func:`curvalg.estimate.eigsh` calls it."""


def solve(
    op: CurvatureOperator,
    k: int,
    *,
    which: End,
    tol: float,
    seed: int,
    checkpoint: Path | None = None,
    progress: bool = False,
) -> Eigenpairs:
    """The k eigenpairs at an end of the spectrum, as of :func:`curvalg.estimate.eigsh`.

    Raises:
        FactsError: the operator is not known to be symmetric.
        ExpressionError: k does not fit the size of the operator.
        ConvergenceError: the tolerance is out of reach.

    >>> import torch
    >>> from curvalg import Problem, registry
    >>> data = (torch.eye(3), torch.zeros(3, 1))
    >>> problem = Problem(torch.nn.Linear(3, 1, bias=False), torch.nn.MSELoss(reduction="sum"), data)
    >>> solve((3 * registry.build("ggn")).lower(problem), 1, which="LA", tol=0, seed=0).eigenvalues
    tensor([6.], dtype=torch.float64)
    """
    return eigsh(op, k, which=which, tol=tol, seed=seed, checkpoint=checkpoint, progress=progress)


def table(op: CurvatureOperator, pairs: Eigenpairs, problem: str) -> Group:
    """The eigenvalues as a table for people, with the operator above it and the cost below."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for column in ("", "eigenvalue λ", "residual ‖Av − λv‖"):
        shown.add_column(column, justify="right")
    values, residuals = pairs.eigenvalues.flip(0).tolist(), pairs.residuals.flip(0).tolist()
    for number, (value, residual) in enumerate(zip(values, residuals, strict=True), start=1):
        shown.add_row(str(number), f"{value:.6g}", f"{residual:.1e}")
    # Beside the table, not its title and caption: those are folded at the width of the columns.
    title = Text(f"{op.expr} on {problem}, {op.shape[0]} x {op.shape[1]}", style="bold")
    return Group(title, Text(), shown, Text(), Text(pairs.cost, style="dim"))


def as_json(op: CurvatureOperator, pairs: Eigenpairs, *, problem: str, which: str, tol: float, seed: int) -> str:
    """The eigenvalues for programs: one JSON object, in descending order."""
    record = {
        "expression": str(op.expr),
        "problem": problem,
        "shape": list(op.shape),
        "dtype": str(op.dtype),
        "k": len(pairs),
        "which": which,
        "tol": tol,
        "seed": seed,
        "eigenvalues": pairs.eigenvalues.flip(0).tolist(),
        "residuals": pairs.residuals.flip(0).tolist(),
        "method": pairs.method,
        "products": pairs.products,
        "seconds": pairs.seconds,
        "partial": pairs.partial,
    }
    return json.dumps(record, indent=2)

"""``curvalg eigs``: a few eigenvalues of a symmetric operator, each with its true residual."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh

from curvalg.errors import ConvergenceError, FactsError, ProblemError
from curvalg.lowering import CurvatureOperator

End: TypeAlias = Literal["LA", "SA", "LM", "BE"]
"""Which end of the spectrum, as ``scipy.sparse.linalg.eigsh`` calls it."""


@dataclass(frozen=True)
class Pairs:
    """Eigenvalues in descending order, and what they cost.

    Args:
        values: shape (k,).
        vectors: shape (D, k), orthonormal columns.
        residuals: ‖A v − λ v‖ of each pair, shape (k,).
        products: products of the operator with one vector, those for the residuals included.
        seconds: time of all of them.
    """

    values: NDArray[np.floating]
    vectors: NDArray[np.floating]
    residuals: NDArray[np.floating]
    products: int
    seconds: float


def check(op: CurvatureOperator, k: int, which: End) -> None:
    """Refuse, before anything is computed, what a symmetric eigensolver cannot do.

    Raises:
        FactsError: the operator is not known to be symmetric.
        ProblemError: k does not fit the size of the operator.
    """
    if op.facts.symmetric is not True:
        known = "is not symmetric" if op.facts.symmetric is False else "is not known to be symmetric"
        raise FactsError(
            f"{op.expr} ({op.shape[0]} x {op.shape[1]}) {known}; eigenvalues are computed of symmetric "
            "operators: write a symmetric expression, such as A.T @ A"
        )
    smallest = 2 if which == "BE" else 1
    if not smallest <= k < op.shape[0]:
        why = " (BE takes from both ends)" if which == "BE" else ""
        raise ProblemError(
            f"expected {smallest} ≤ k ≤ {op.shape[0] - 1}{why} for an operator of size {op.shape[0]}, got {k}"
        )


def solve(
    op: CurvatureOperator, k: int, *, which: End, tol: float, seed: int, say: Callable[[str], None] = lambda _: None
) -> Pairs:
    """k eigenpairs by ARPACK, from a start vector that the seed fixes.

    Args:
        op: a symmetric operator.
        k: how many.
        which: "LA", "SA", "LM" or "BE".
        tol: relative tolerance; 0 for machine precision.
        seed: of the start vector.
        say: is told of each product.

    Raises:
        ConvergenceError: ARPACK gave up.

    >>> import torch
    >>> from curvalg import Problem, registry
    >>> data = (torch.eye(3), torch.zeros(3, 1))
    >>> problem = Problem(torch.nn.Linear(3, 1, bias=False), torch.nn.MSELoss(reduction="sum"), data)
    >>> solve((3 * registry.build("ggn")).lower(problem), 1, which="LA", tol=0, seed=0).values.round(3)
    array([6.], dtype=float32)
    """
    begin, products = time.perf_counter(), 0

    def multiply(x: NDArray[np.floating]) -> NDArray[np.floating]:
        nonlocal products
        products += 1
        say(f"eigenvalues of {op.expr}: product {products}")
        result: NDArray[np.floating] = op @ x.reshape(-1)
        return result

    counted = LinearOperator(op.shape, matvec=multiply, dtype=op.dtype)
    # Without v0, eigsh draws one of its own, and two runs differ.
    start = np.random.default_rng(seed).standard_normal(op.shape[0]).astype(op.dtype)
    try:
        values, vectors = eigsh(counted, k, which=which, tol=tol, v0=start)
    except ArpackError as error:
        raise ConvergenceError(_why(error, k, tol, products)) from error
    order = np.argsort(values)[::-1]
    values, vectors = values[order], vectors[:, order]
    residuals = np.linalg.norm(op @ vectors - vectors * values, axis=0)
    return Pairs(values, vectors, residuals, products + k, time.perf_counter() - begin)


def _why(error: ArpackError, k: int, tol: float, products: int) -> str:
    if isinstance(error, ArpackNoConvergence):
        reached = f"{len(error.eigenvalues)} of {k} eigenvalues reached tol={tol:g} within {products} products"
        return f"{reached}; raise --tol, or ask for another --k"
    return f"ARPACK stopped after {products} products ({error}); try another --k or --seed"


def table(op: CurvatureOperator, pairs: Pairs, problem: str) -> Group:
    """The eigenvalues as a table for people, what they are of above it, what they cost below."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for column in ("", "eigenvalue λ", "residual ‖Av − λv‖"):
        shown.add_column(column, justify="right")
    for number, (value, residual) in enumerate(zip(pairs.values, pairs.residuals, strict=True), start=1):
        shown.add_row(str(number), f"{value:.6g}", f"{residual:.1e}")
    # Beside the table, not its title and caption: those are folded at the width of the columns.
    title = Text(f"{op.expr} on {problem}, {op.shape[0]} x {op.shape[1]}", style="bold")
    return Group(title, Text(), shown, Text(), Text(f"{pairs.products} products in {pairs.seconds:.2f} s", style="dim"))


def as_json(op: CurvatureOperator, pairs: Pairs, *, problem: str, which: str, tol: float, seed: int) -> str:
    """The same for programs: one JSON object; eigenvalues in descending order."""
    record = {
        "expression": str(op.expr),
        "problem": problem,
        "shape": list(op.shape),
        "dtype": str(op.dtype),
        "k": len(pairs.values),
        "which": which,
        "tol": tol,
        "seed": seed,
        "eigenvalues": pairs.values.tolist(),
        "residuals": pairs.residuals.tolist(),
        "products": pairs.products,
        "seconds": pairs.seconds,
    }
    return json.dumps(record, indent=2)

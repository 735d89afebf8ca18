"""The command ``curvalg estimate``: one number of an operator, with its standard error."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from curvalg import estimate
from curvalg.errors import ExpressionError
from curvalg.estimate import Estimate
from curvalg.expr import Expr
from curvalg.problem import Problem


@dataclass(frozen=True)
class Asked:
    """The flags that all estimated quantities share.

    Args:
        products, tol, seed, checkpoint, progress: as of :func:`curvalg.estimate.trace`.
        damping: λ of those that have one.
    """

    products: int | None
    tol: float | None
    seed: int
    checkpoint: Path | None
    progress: bool
    damping: float | None

    def keywords(self) -> dict[str, Any]:
        """The keywords for the estimators; they choose what was not given."""
        given = {"tol": self.tol, "seed": self.seed, "checkpoint": self.checkpoint, "progress": self.progress}
        return given if self.products is None else {**given, "products": self.products}

    def required(self, quantity: str) -> float:
        """The damping λ, which must be given.

        Raises:
            ExpressionError: it was not given.
        """
        if self.damping is None:
            raise ExpressionError(f"{quantity} needs a damping λ; pass --damping 1e-3")
        return self.damping


Quantity = Callable[[Expr, Problem, Asked], Estimate]


def _plain(function: Callable[..., Estimate]) -> Quantity:
    def quantity(expr: Expr, problem: Problem, asked: Asked) -> Estimate:
        if asked.damping is not None:
            raise ExpressionError("--damping is for effective-dimension and tic; write expr + 1e-3 * identity instead")
        return function(expr.lower(problem), **asked.keywords())

    return quantity


def _effective_dimension(expr: Expr, problem: Problem, asked: Asked) -> Estimate:
    damping = asked.required("the effective dimension")
    return estimate.effective_dimension(expr.lower(problem), damping, **asked.keywords())


def _tic(expr: Expr, problem: Problem, asked: Asked) -> Estimate:
    return estimate.tic(problem, hessian=expr, damping=asked.damping or 0.0, **asked.keywords())


QUANTITIES: dict[str, Quantity] = {
    "trace": _plain(estimate.trace),
    "norm": _plain(estimate.norm),
    "logdet": _plain(estimate.logdet),
    "effective-dimension": _effective_dimension,
    "tic": _tic,
}


def line(result: Estimate, quantity: str, expression: str, problem: str) -> Text:
    """The result as a line for people."""
    error = " (exact)" if result.method == "exact" else f" ± {result.error:.2g}"
    return Text.assemble(
        (f"{quantity} of {expression} on {problem}", "bold"), f"\n{result.value:.6g}{error}\n", (result.cost, "dim")
    )


def as_json(result: Estimate, quantity: str, expression: str, problem: str) -> str:
    """The result as JSON for programs."""
    record = {
        "quantity": quantity,
        "expression": expression,
        "problem": problem,
        "value": result.value,
        "error": result.error,
        "method": result.method,
        "products": result.products,
        "seconds": result.seconds,
        "converged": result.converged,
        "partial": result.partial,
    }
    return json.dumps(record, indent=2)

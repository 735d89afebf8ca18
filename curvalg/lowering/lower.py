"""From an unbound expression to an operator."""

from __future__ import annotations

from curvalg.errors import ExpressionError
from curvalg.expr.node import Expr, require_hashable
from curvalg.lowering.operator import CurvatureOperator, Preconditioner
from curvalg.problem import Problem


def lower(expr: Expr, problem: Problem, *, preconditioner: Preconditioner = None) -> CurvatureOperator:
    """Bind an expression to a problem; see :meth:`curvalg.Expr.lower`."""
    if not isinstance(problem, Problem):
        raise ExpressionError(f"expected a curvalg.Problem to lower on, got {type(problem).__name__}")
    require_hashable(expr)
    return CurvatureOperator(expr, problem, preconditioner)

"""Expressions as sums Σ cᵢ Aᵢ + shift · I, with floats for coefficients."""

from __future__ import annotations

import math

from curvalg.errors import FactsError
from curvalg.expr import Expr, IdentityExpr, Inverse, SquareRoot, Sum, ZeroExpr
from curvalg.expr.scalars import as_float


def affine(expr: Expr) -> tuple[list[tuple[float, Expr]], float]:
    """The expression as Σ cᵢ Aᵢ + shift · I.

    Raises:
        ExpressionError: a coefficient is out of a float's range.
    """
    if expr.domain is None:
        return [], multiple(expr)
    if isinstance(expr, ZeroExpr):
        return [], 0.0
    if isinstance(expr, Sum):
        sized = [(as_float(c), part) for part, c in expr.coefficients.items() if part.domain is not None]
        sizeless = [as_float(c) * multiple(part) for part, c in expr.coefficients.items() if part.domain is None]
        return sized, sum(sizeless, as_float(expr.shift))
    return [(1.0, expr)], 0.0


def multiple(expr: Expr) -> float:
    """The number c of an expression without a size of its own, all of which are c · I: sqrt(2 * Identity).

    Raises:
        FactsError: the inverse of zero, or the square root of a negative number.
    """
    if isinstance(expr, IdentityExpr):
        return 1.0
    if isinstance(expr, Inverse):
        if not (inner := multiple(expr.expr)):
            raise FactsError(f"{expr.expr} is zero, so it has no inverse; add damping, c * Identity")
        return 1 / inner
    parts = [multiple(child) for child in expr.children]
    if isinstance(expr, Sum):
        return sum(
            (as_float(c) * part for c, part in zip(expr.coefficients.values(), parts, strict=True)),
            as_float(expr.shift),
        )
    if isinstance(expr, SquareRoot):
        if parts[0] < 0:
            raise FactsError(f"{expr.expr} is {parts[0]:.3g} * Identity, so it has no real square root")
        return math.sqrt(parts[0])
    return math.prod(parts) if not isinstance(expr, ZeroExpr) else 0.0

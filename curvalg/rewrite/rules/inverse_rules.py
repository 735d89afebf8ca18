"""Inverses of what has an exact one in terms of other inverses. Which solver takes what is left is no law."""

from __future__ import annotations

from curvalg.expr import Identity, Inverse, Product, Sum, add, inverse, multiply
from curvalg.expr.facts import LossFacts
from curvalg.expr.node import Expr
from curvalg.expr.nodes.composite import side, square


def of_inverse(expr: Inverse, loss: LossFacts | None) -> Expr | None:
    return expr.expr.expr if isinstance(expr.expr, Inverse) else None


def of_multiple(expr: Inverse, loss: LossFacts | None) -> Expr | None:
    if expr.expr == Identity:
        return Identity
    if not isinstance(total := expr.expr, Sum):
        return None
    if not total.coefficients:
        return add([(total.space or Identity, 1 if total.space else 0), (Identity, 1 / total.shift)])
    if len(total.coefficients) == 1 and not total.shift:
        ((part, coefficient),) = total.coefficients.items()
        return add([(inverse(part, **expr.options), 1 / coefficient)])
    return None


def of_product(expr: Inverse, loss: LossFacts | None) -> Expr | None:
    # A preconditioner is for the whole product and for none of its factors.
    if not isinstance(expr.expr, Product) or expr.preconditioner is not None:
        return None
    factors, where = expr.expr.factors, side(expr.expr, "domain")
    if not all(square(f) and (f.domain is None or side(f, "domain") == where) for f in factors):
        return None
    # Symmetric products, as A.T @ A, have solvers that their factors alone would not have.
    if expr.expr.facts(loss).symmetric and not all(f.facts(loss).symmetric for f in factors):
        return None
    return multiply([inverse(factor, **expr.options) for factor in reversed(factors)])

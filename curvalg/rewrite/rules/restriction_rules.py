"""Sub-matrices move inward where a sub-matrix of the whole is made of sub-matrices of the parts."""

from __future__ import annotations

from curvalg.expr import DiagonalPart, Identity, Product, Restriction, Sum, add, diagonal_part, multiply, restrict
from curvalg.expr.facts import LossFacts
from curvalg.expr.node import Expr


def of_sum(expr: Restriction, loss: LossFacts | None) -> Expr | None:
    if isinstance(total := expr.expr, Sum):
        parts = [(restrict(part, expr.params), c) for part, c in total.coefficients.items()]
        space = [] if total.space is None else [(restrict(total.space, expr.params), 1)]
        return add([*parts, *space, (Identity, total.shift)])
    return None


def of_product(expr: Restriction, loss: LossFacts | None) -> Expr | None:
    # Only where the inner spaces are outputs: P J D then J P' with D on outputs. Between parameters a sub-matrix of a
    # product is not the product of sub-matrices.
    if not isinstance(expr.expr, Product):
        return None
    first, *middle, last = expr.expr.factors
    if any("parameters" in (factor.domain, factor.codomain) for factor in middle):
        return None
    if first.domain != "outputs" or last.codomain != "outputs":
        return None
    ends = [restrict(f, expr.params) if "parameters" in (f.domain, f.codomain) else f for f in (first, last)]
    return multiply([ends[0], *middle, ends[1]])


def of_diagonal_part(expr: Restriction, loss: LossFacts | None) -> Expr | None:
    if isinstance(expr.expr, DiagonalPart):
        return diagonal_part(restrict(expr.expr.expr, expr.params))
    return None

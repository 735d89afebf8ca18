"""Transposes move inward until they meet a leaf, and end there."""

from __future__ import annotations

from fractions import Fraction

from curvalg.expr import Kronecker, LowRank, Transpose, transpose
from curvalg.expr.facts import LossFacts
from curvalg.expr.node import Expr
from curvalg.rewrite.engine import Apply


def of_symmetric(expr: Transpose, loss: LossFacts | None) -> Expr | None:
    return expr.expr if expr.expr.facts(loss).symmetric else None


def of(*kind: type[Expr]) -> Apply:
    """The law for transposes of some kinds of nodes, where the node is not known to be symmetric."""

    def apply(expr: Transpose, loss: LossFacts | None) -> Expr | None:
        if isinstance(expr.expr, kind) and not expr.expr.facts(loss).symmetric:
            return expr.expr.transposed(transpose)
        return None

    return apply


def of_kronecker(expr: Transpose, loss: LossFacts | None) -> Expr | None:
    if not isinstance(leaf := expr.expr, Kronecker) or leaf.facts(loss).symmetric:
        return None
    factors = [factor.swapaxes(-1, -2) for factor in leaf.factors]
    return Kronecker.derived(factors, "transpose", [(leaf.token, Fraction(1))], origin=expr, order=leaf.order)


def of_low_rank(expr: Transpose, loss: LossFacts | None) -> Expr | None:
    if not isinstance(leaf := expr.expr, LowRank) or leaf.facts(loss).symmetric:
        return None
    core = leaf.core if leaf.core is None or leaf.core.ndim == 1 else leaf.core.T
    left, right = (leaf.left, None) if leaf.right is None else (leaf.right, leaf.left)
    return LowRank.derived([left, core, right], "transpose", [(leaf.token, Fraction(1))], origin=expr)

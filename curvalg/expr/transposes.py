"""Transposes, and telling that an expression is symmetric from how it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from curvalg.errors import ExpressionError
from curvalg.expr.constants import IdentityExpr, ZeroExpr
from curvalg.expr.facts import Facts, LossFacts
from curvalg.expr.leaves import ArrayLeaf
from curvalg.expr.node import Expr, Space


class Reversed(Expr):
    """What maps the other way than the one expression in it: a transpose, an inverse."""

    expr: Expr

    @property
    def domain(self) -> Space | None:  # type: ignore[override]
        return self.expr.codomain

    @property
    def codomain(self) -> Space | None:  # type: ignore[override]
        return self.expr.domain

    @property
    def domain_params(self) -> tuple[str, ...] | None:
        return self.expr.codomain_params

    @property
    def codomain_params(self) -> tuple[str, ...] | None:
        return self.expr.domain_params

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.expr,)


class SelfTransposed(Expr):
    """What is symmetric by construction, on the side of the one expression in it: a square root, a diagonal part."""

    expr: Expr

    @property
    def domain(self) -> Space | None:  # type: ignore[override]
        return self.expr.domain

    @property
    def codomain(self) -> Space | None:  # type: ignore[override]
        return self.expr.codomain

    @property
    def domain_params(self) -> tuple[str, ...] | None:
        return self.expr.domain_params

    @property
    def codomain_params(self) -> tuple[str, ...] | None:
        return self.expr.codomain_params

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.expr,)

    def transposed(self, of: Callable[[Expr], Expr]) -> Expr:
        return self


@dataclass(frozen=True, repr=False)
class Transpose(Reversed):
    """The transpose of an expression; made by ``.T``."""

    expr: Expr

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        return transpose(children[0])

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return self.expr.facts(loss)


def transpose(expr: Expr) -> Expr:
    """The transpose; a double transpose is the expression itself."""
    if isinstance(expr, Transpose):
        return expr.expr
    if isinstance(expr, ArrayLeaf) and isinstance(expr.origin, Transpose):
        return expr.origin.expr
    if isinstance(expr, IdentityExpr):
        return expr
    if isinstance(expr, ZeroExpr):
        return ZeroExpr(expr.domain, expr.codomain, expr.domain_params, expr.codomain_params)
    return Transpose(expr)


def symmetric_form(expr: Expr, loss: LossFacts | None = None) -> Expr | None:
    """The expression with its transposes moved inward, if its transpose has the same form; None if not.

    So H G + G H and A + Aᵀ are seen to be symmetric, and (A B)ᵀ (A B) to be Bᵀ Aᵀ A B.
    """
    try:
        form = _inward(expr, loss, False)
        return form if form == _inward(expr, loss, True) else None
    except ExpressionError:  # the inverse of what turned out to be zero
        return None


def _inward(expr: Expr, loss: LossFacts | None, flipped: bool) -> Expr:
    """The expression, or its transpose, with transposes at the leaves alone, and none at those known symmetric."""
    if isinstance(expr, ArrayLeaf) and expr.origin is not None:
        expr = expr.origin
    if isinstance(expr, Transpose):
        return _inward(expr.expr, loss, not flipped)
    if isinstance(expr, SelfTransposed):
        flipped = False
    if not expr.children:
        return transpose(expr) if flipped and not expr.facts(loss).symmetric else expr
    if flipped:
        return expr.transposed(lambda child: _inward(child, loss, True))
    return expr.rebuild(tuple(_inward(child, loss, False) for child in expr.children))

"""Transposes, and telling that an expression is symmetric from how it is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from curvalg.errors import ExpressionError
from curvalg.expr.facts import Facts, LossFacts
from curvalg.expr.node import Expr
from curvalg.expr.nodes.arrays import ArrayLeaf
from curvalg.expr.nodes.composite import Composite, Side, settled, side
from curvalg.expr.nodes.constants import IdentityExpr, ZeroExpr


class Reversed(Composite):
    """What maps the other way than the one expression in it: a transpose, an inverse."""

    expr: Expr

    def find_sides(self) -> tuple[Side, Side]:
        return side(self.expr, "domain"), side(self.expr, "codomain")

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.expr,)


class SelfTransposed(Composite):
    """What is symmetric by construction, on the side of the one expression in it: a square root, a diagonal part."""

    expr: Expr

    def find_sides(self) -> tuple[Side, Side]:
        return side(self.expr, "codomain"), side(self.expr, "domain")

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.expr,)

    def transposed(self, of: Callable[[Expr], Expr]) -> Expr:
        return self


@dataclass(frozen=True, repr=False, eq=False)
class Transpose(Reversed):
    """The transpose of an expression; made by ``.T``."""

    expr: Expr

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        return transpose(children[0])

    def find_facts(self, loss: LossFacts | None) -> Facts:
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
    forms = _forms(expr, loss)
    return forms[0] if forms is not None and forms[0] is forms[1] else None


Forms = tuple[Expr, Expr] | None
"""An expression and its transpose with transposes at the leaves alone, and none at those known symmetric; one object where
they are equal. None where there are none: the inverse of what turned out to be zero."""


def _forms(expr: Expr, loss: LossFacts | None) -> Forms:
    if isinstance(expr, ArrayLeaf) and expr.origin is not None:
        return _forms(expr.origin, loss)
    if not expr.children:
        return expr, expr if expr.facts(loss).symmetric else transpose(expr)
    kept = settled(expr, ("forms", loss), lambda node: _from_parts(node, loss))
    return None if kept is None else (kept[0] or expr, kept[1] or expr)


def _from_parts(expr: Expr, loss: LossFacts | None) -> tuple[Expr | None, Expr | None] | None:
    """The forms of a node from those of its parts; None in place of the node itself, which is not to hold itself."""
    parts = [_forms(child, loss) for child in expr.children]
    if None in parts:
        return None
    if isinstance(expr, Transpose):
        return None if parts[0] is None else parts[0][::-1]
    try:
        plain = tuple(part[0] for part in parts if part is not None)
        same = all(new is old for new, old in zip(plain, expr.children, strict=True))
        form = expr if same else expr.rebuild(plain)
        turned = form if isinstance(expr, SelfTransposed) else expr.transposed(lambda part: _turned(part, loss))
    except ExpressionError:
        return None
    turned = form if turned == form else turned
    return (None if form is expr else form), (None if turned is expr else turned)


def _turned(expr: Expr, loss: LossFacts | None) -> Expr:
    forms = _forms(expr, loss)
    if forms is None:
        raise ExpressionError(f"{expr} has no transpose")
    return forms[1]

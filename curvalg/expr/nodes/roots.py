"""Square roots of positive semi-definite matrices."""

from __future__ import annotations

from dataclasses import dataclass

from curvalg.errors import ExpressionError
from curvalg.expr.facts import Facts, LossFacts
from curvalg.expr.node import Expr
from curvalg.expr.nodes.composite import require_semidefinite, shape, square
from curvalg.expr.nodes.constants import IdentityExpr, ZeroExpr
from curvalg.expr.nodes.inverse import inverse
from curvalg.expr.nodes.transposes import SelfTransposed


@dataclass(frozen=True, repr=False, eq=False)
class SquareRoot(SelfTransposed):
    """The symmetric positive semi-definite square root; made by :func:`sqrt`."""

    expr: Expr

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        return sqrt(children[0])

    def find_facts(self, loss: LossFacts | None) -> Facts:
        return Facts(psd=True, positive_definite=True if self.expr.facts(loss).positive_definite else None)


def sqrt(expr: Expr) -> Expr:
    """The square root A^{1/2}: the symmetric positive semi-definite matrix with A^{1/2} A^{1/2} = A.

    Args:
        expr: a square expression, symmetric and positive semi-definite. What is not known to be is taken on trust here
            and checked when numbers are at hand.

    Raises:
        ExpressionError: not square, or known not to be symmetric or not to be positive semi-definite.

    >>> from curvalg import Identity, registry, sqrt
    >>> root = sqrt(registry.build("ggn") + 0.1 * Identity)
    >>> print(root)
    sqrt(ggn + 0.1*identity)
    >>> print((root @ root).simplify())
    ggn + 0.1*identity
    """
    if not isinstance(expr, Expr):
        raise ExpressionError(f"sqrt() takes an expression such as registry.build('ggn'), got {type(expr).__name__}")
    if not square(expr):
        raise ExpressionError(f"only a square operator has a square root; {expr} is {shape(expr)}")
    if isinstance(expr, (IdentityExpr, ZeroExpr)):
        return expr
    require_semidefinite(expr, "sqrt")
    return SquareRoot(expr)


def inv_sqrt(expr: Expr) -> Expr:
    """The inverse of the square root, A^{-1/2}: short for ``inverse(sqrt(expr))``.

    Args:
        expr: a square expression, symmetric and positive definite.

    Raises:
        ExpressionError: as of :func:`sqrt`, and for zero.

    >>> from curvalg import Identity, inv_sqrt, registry
    >>> print(inv_sqrt(registry.build("ggn") + 0.1 * Identity))
    inv_sqrt(ggn + 0.1*identity)
    """
    return inverse(sqrt(expr))

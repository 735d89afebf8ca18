"""Restrictions: sub-matrices over chosen parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from curvalg.errors import ExpressionError
from curvalg.expr.facts import Facts, LossFacts
from curvalg.expr.node import Expr
from curvalg.expr.nodes.composite import Composite, Side, as_patterns, shape, side
from curvalg.expr.nodes.constants import ZeroExpr, zero_between
from curvalg.expr.nodes.sums import add


@dataclass(frozen=True, repr=False, eq=False)
class Restriction(Composite):
    """The sub-matrix over chosen parameters, in their own layout; made by :func:`restrict`."""

    expr: Expr
    params: tuple[str, ...]

    def find_sides(self) -> tuple[Side, Side]:
        spaces = self.expr.codomain, self.expr.domain
        codomain, domain = ((space, self.params if space == "parameters" else None) for space in spaces)
        return codomain, domain

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.expr,)

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        return restrict(children[0], self.params)

    def transposed(self, of: Callable[[Expr], Expr]) -> Expr:
        return restrict(of(self.expr), self.params)

    def find_facts(self, loss: LossFacts | None) -> Facts:
        inner = self.expr.facts(loss)
        if self.domain != self.codomain:
            return Facts(symmetric=False)
        return Facts(inner.symmetric or None, inner.psd or None, inner.positive_definite or None)


def restrict(expr: Expr, params: str | Sequence[str]) -> Expr:
    """The sub-matrix of an expression over some parameters (of a jacobian: its columns), in their own layout.

    Args:
        expr: an expression with parameters on at least one side.
        params: names or glob patterns, matched against the problem's parameter names when lowered.

    Raises:
        ExpressionError: the expression has no parameter side, or is restricted to other parameters already.

    >>> from curvalg import registry, restrict
    >>> print(restrict(registry.build("hessian"), "head.*"))
    restrict(hessian, 'head.*')
    """
    patterns = as_patterns(params)
    if not isinstance(expr, Expr):
        raise ExpressionError(
            f"restrict() takes an expression such as registry.build('ggn'), got {type(expr).__name__}"
        )
    if expr.domain is None:  # as the identity: of any size before, of these parameters now
        return add([(expr, 1), (ZeroExpr("parameters", "parameters", patterns, patterns), 1)])
    if "parameters" not in (expr.domain, expr.codomain):
        raise ExpressionError(f"restrict() chooses parameters, but {expr} is {shape(expr)}")
    sides = (side(expr, "domain"), side(expr, "codomain"))
    inner = [params for space, params in sides if space == "parameters"]
    if all(params == patterns for params in inner):
        return expr
    if restricted := next((params for params in inner if params is not None), None):
        raise ExpressionError(
            f"{expr} is restricted to {list(restricted)} already; restrict the original to {list(patterns)}"
        )
    part = Restriction(expr, patterns)
    return zero_between(part, part) if isinstance(expr, ZeroExpr) else part

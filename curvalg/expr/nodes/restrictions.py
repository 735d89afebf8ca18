"""Restrictions: sub-matrices over chosen parameters, and over single numbers of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from curvalg.errors import ExpressionError
from curvalg.expr.entries import Entries, entries_of
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


@dataclass(frozen=True, repr=False, eq=False)
class EntryRestriction(Composite):
    """The sub-matrix over chosen entries of an expression that is restricted to their parameters: Eᵀ A E for a selection E.

    Made by :func:`restrict`.
    """

    expr: Expr
    entries: Entries

    def find_sides(self) -> tuple[Side, Side]:
        # Sides are compared, and no more: what reads names of them asks entries_of first.
        own = cast("tuple[str, ...]", (self.entries,))
        spaces = self.expr.codomain, self.expr.domain
        codomain, domain = ((space, own if space == "parameters" else None) for space in spaces)
        return codomain, domain

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.expr,)

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        return over_entries(children[0], self.entries)

    def transposed(self, of: Callable[[Expr], Expr]) -> Expr:
        return over_entries(of(self.expr), self.entries)

    def content(self, of: Callable[[Expr], Hashable]) -> Hashable:
        return of(self.expr), self.entries

    def find_facts(self, loss: LossFacts | None) -> Facts:
        inner = self.expr.facts(loss)
        if self.domain != self.codomain:
            return Facts(symmetric=False)
        return Facts(inner.symmetric or None, inner.psd or None, inner.positive_definite or None)


def restrict(expr: Expr, params: str | Sequence[str] | Mapping[str, Any] | Entries) -> Expr:
    """The sub-matrix of an expression over some parameters (of a jacobian: its columns), in their own layout.

    Over some numbers of them, it is Eᵀ A E for the columns E of the identity that are kept. These lie in the order of the flat
    layout; vectors have the chosen numbers (k,) of each parameter, or its own shape where all of it is chosen.

    Args:
        expr: an expression with parameters on at least one side.
        params: names or glob patterns, matched against the problem's parameter names when lowered; or a mapping from names to a
            boolean mask of the parameter's shape, integers into the flattened parameter (row-major), a slice of it, or ``...``
            or True for all of it.

    Raises:
        ExpressionError: the expression has no parameter side, or is restricted to other parameters already.
        OptionError: a choice of another kind, without a number in it, or with one number twice. Shapes and names are compared
            with those of the problem when the expression is lowered.

    >>> from curvalg import registry, restrict
    >>> print(restrict(registry.build("hessian"), "head.*"))
    restrict(hessian, 'head.*')
    >>> import numpy as np
    >>> kept = {"weight": np.array([[True, False, True]]), "bias": ...}
    >>> print(restrict(registry.build("hessian"), kept))
    restrict(hessian, Entries<bias, weight[2]; 3716b8>)
    """
    if isinstance(params, (Mapping, Entries)):
        return _over_entries(expr, params if isinstance(params, Entries) else Entries(params))
    if isinstance(params, tuple) and (entries := entries_of(params)) is not None:
        return _over_entries(expr, entries)
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


def _over_entries(expr: Expr, entries: Entries) -> Expr:
    """The sub-matrix over entries: of the one over their parameters."""
    sides = [side(expr, "domain"), side(expr, "codomain")] if isinstance(expr, Expr) else []
    inner = [params for space, params in sides if space == "parameters"]
    if inner and all(entries_of(params) == entries for params in inner):
        return expr
    named = restrict(expr, entries.names)
    if entries.whole:
        return named
    return over_entries(expr if expr.domain is None else named, entries)


def over_entries(expr: Expr, entries: Entries) -> Expr:
    """The sub-matrix over entries of an expression that is restricted to their parameters, or of any size."""
    own = cast("tuple[str, ...]", (entries,))
    if expr.domain is None:
        return add([(expr, 1), (ZeroExpr("parameters", "parameters", own, own), 1)])
    if isinstance(expr, ZeroExpr):
        sides = (own if space == "parameters" else None for space in (expr.codomain, expr.domain))
        return ZeroExpr(expr.codomain, expr.domain, *sides)
    return EntryRestriction(expr, entries)

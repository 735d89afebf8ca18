"""Sides of an operator: the space it acts on, the space it maps to, and the parameters each is restricted to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from curvalg.errors import ExpressionError, OptionError
from curvalg.expr.node import Expr
from curvalg.expr.nodes.composite import Side


def side(expr: Expr, which: Literal["domain", "codomain"]) -> Side:
    """One side of an expression. Two expressions fit together where these are equal."""
    if which == "domain":
        return expr.domain, expr.domain_params
    return expr.codomain, expr.codomain_params


def square(expr: Expr) -> bool:
    """Whether both sides are the same space, as written; two different patterns may choose the same parameters."""
    return side(expr, "domain") == side(expr, "codomain")


def shape(expr: Expr) -> str:
    """``domain -> codomain``, for messages."""

    def name(which: Literal["domain", "codomain"]) -> str:
        space, params = side(expr, which)
        return f"{space or 'any'}{list(params) if params else ''}"

    return f"{name('domain')} -> {name('codomain')}"


def require_endomorphism(expr: Expr, what: str) -> None:
    """Refuse what does not map parameters to the same parameters.

    Raises:
        ExpressionError: not an expression, or one with another side.
    """
    if not isinstance(expr, Expr):
        raise ExpressionError(f"{what}() takes an expression, got {type(expr).__name__}")
    if {expr.domain, expr.codomain} - {"parameters", None} or expr.domain_params != expr.codomain_params:
        raise ExpressionError(f"{what}() needs an operator on parameters; {expr} is {shape(expr)}")


def require_semidefinite(expr: Expr, what: str) -> None:
    """Refuse what is known, of any loss, not to be symmetric or not to be positive semi-definite.

    Raises:
        ExpressionError: one of the two is refuted.
    """
    facts = expr.facts()
    if facts.psd is False:
        missing = "symmetric" if facts.symmetric is False else "positive semi-definite"
        raise ExpressionError(f"{what}() needs a symmetric positive semi-definite operator; {expr} is not {missing}")


def as_patterns(params: str | Sequence[str]) -> tuple[str, ...]:
    """Names or glob patterns as a tuple without repeats.

    Raises:
        ExpressionError: empty, or not strings.
    """
    given = (params,) if isinstance(params, str) or not isinstance(params, Iterable) else tuple(params)
    patterns = tuple(p for i, p in enumerate(given) if p not in given[:i])
    if not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise OptionError(f"expected parameter names or glob patterns such as 'head.*', got {params!r}")
    return patterns

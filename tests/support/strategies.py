"""Hypothesis strategies of random expressions: every kind of node, every built-in term, nested."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from hypothesis import strategies as st

from curvalg.errors import ExpressionError
from curvalg.expr import (
    GGN,
    SOLVERS,
    Block,
    CenteredCovariance,
    Covariance,
    Expr,
    Fisher,
    Hessian,
    Identity,
    Jacobian,
    LossHessian,
    MonteCarloFisher,
    MonteCarloGGN,
    Residual,
    Space,
    Zero,
    ZeroExpr,
    block_diagonal,
    diagonal_part,
    inv_sqrt,
    inverse,
    nystrom,
    restrict,
    sqrt,
)

P: Space = "parameters"
O: Space = "outputs"
Kind = tuple[Space, Space]  # codomain, domain
Leaves = Mapping[Kind, st.SearchStrategy[Expr]]

PATTERNS = ("head.*", "w", "it's", 'say "w"', "Diagonal<3, float64>", "ü.\\b")
patterns = st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=2, unique=True).map(tuple)

moderate = st.one_of(st.integers(-4, 4), st.fractions(-4, 4, max_denominator=7)).filter(bool).map(Fraction)
coefficients = st.one_of(
    moderate,
    st.integers().filter(bool),
    st.fractions().filter(bool),
    st.floats(allow_nan=False, allow_infinity=False).filter(bool),
)
_draws = {"samples": st.integers(1, 9), "seed": st.integers(0, 2**40)}


def terms() -> st.SearchStrategy[Expr]:
    """Built-in terms on parameter space."""
    plain = [Hessian(), GGN(), Fisher(), Residual(), Covariance(), CenteredCovariance()]
    return st.one_of(st.sampled_from(plain), st.builds(MonteCarloGGN, **_draws), st.builds(MonteCarloFisher, **_draws))


def _leaf(*exprs: Expr) -> st.SearchStrategy[Expr]:
    return st.sampled_from(exprs)


LEAVES: Leaves = {
    # Zeros are rare: one of them swallows the whole product around it.
    (P, P): st.one_of(*[terms()] * 5, _leaf(Identity, Identity, Identity, Zero, ZeroExpr(P, P))),
    (O, O): _leaf(*[LossHessian()] * 12, Identity, Identity, Identity, ZeroExpr(O, O)),
    (O, P): _leaf(*[Jacobian()] * 15, ZeroExpr(O, P)),
    (P, O): _leaf(*[Jacobian().T] * 15, ZeroExpr(P, O)),
}


@st.composite
def expressions(
    draw: st.DrawFn,
    kind: Kind = (P, P),
    *,
    params: tuple[str, ...] | None = None,
    leaves: Leaves = LEAVES,
    scales: st.SearchStrategy[Any] = coefficients,
    names: st.SearchStrategy[tuple[str, ...]] = patterns,
    depth: int = 4,
) -> Expr:
    """Expressions between the spaces of ``kind`` (codomain, domain), restricted to ``params`` where given."""
    return _Grammar(draw, leaves, scales, names).expression(kind, params, depth)


class _Grammar:
    """Draws node by node: a strategy built ahead, of all that may come, would be exponentially large."""

    def __init__(self, draw: st.DrawFn, leaves: Leaves, scales: Any, names: Any) -> None:
        self.draw, self.leaves, self.scales, self.names = draw, leaves, scales, names

    def expression(self, kind: Kind, params: tuple[str, ...] | None, depth: int) -> Expr:
        rules = ["leaf"]
        if depth > 0:
            rules += ["sum", "sum", "transpose", "product", "product"]
            rules += ["shift", "power", "inverse", "root"] if kind[0] == kind[1] else []
            rules += ["whole", "diagonal", "nystrom"] if kind == (P, P) else []
            rules += ["blocks"] if kind == (P, P) and params is None else []
            rules += ["restrict"] if P in kind and params is not None else []
        rule: Callable[[Kind, tuple[str, ...] | None, int], Expr] = getattr(self, self.draw(st.sampled_from(rules)))
        return rule(kind, params, depth - 1)

    def leaf(self, kind: Kind, params: tuple[str, ...] | None, depth: int) -> Expr:
        expr = self.draw(self.leaves[kind])
        return expr if params is None or kind == (O, O) else restrict(expr, params)

    def restrict(self, kind: Kind, params: tuple[str, ...] | None, depth: int) -> Expr:
        assert params is not None
        return restrict(self.expression(kind, None, depth), params)

    def sum(self, kind: Kind, params: tuple[str, ...] | None, depth: int) -> Expr:
        count = self.draw(st.integers(2, 4))
        parts = [self.draw(self.scales) * self.expression(kind, params, depth) for _ in range(count)]
        return functools.reduce(lambda a, b: a + b, parts)

    def transpose(self, kind: Kind, params: tuple[str, ...] | None, depth: int) -> Expr:
        return self.expression((kind[1], kind[0]), params, depth).T

    def product(self, kind: Kind, params: tuple[str, ...] | None, depth: int) -> Expr:
        middle = self.draw(st.sampled_from((P, O)))
        return self.expression((kind[0], middle), params, depth) @ self.expression((middle, kind[1]), params, depth)

    def shift(self, kind: Kind, params: tuple[str, ...] | None, depth: int) -> Expr:
        return self.expression(kind, params, depth) + self.draw(self.scales) * Identity

    def power(self, kind: Kind, params: tuple[str, ...] | None, depth: int) -> Expr:
        return self.expression(kind, params, depth) ** self.draw(st.integers(0, 3))

    def inverse(self, kind: Kind, params: tuple[str, ...] | None, depth: int) -> Expr:
        expr = self.expression(kind, params, depth)
        options = self.draw(INVERSE_OPTIONS)
        if self.draw(st.booleans()):
            options["preconditioner"] = self.expression(kind, params, 0)
        try:
            return inverse(expr, **options)
        except ExpressionError:  # a sum that cancelled
            return expr

    def root(self, kind: Kind, params: tuple[str, ...] | None, depth: int) -> Expr:
        expr = self.expression(kind, params, depth)
        try:
            return self.draw(st.sampled_from((sqrt, sqrt, inv_sqrt)))(expr)
        except ExpressionError:  # zero, or known not to be positive semi-definite
            return expr

    def diagonal(self, kind: Kind, params: tuple[str, ...] | None, depth: int) -> Expr:
        return diagonal_part(self.expression(kind, params, depth))

    def nystrom(self, kind: Kind, params: tuple[str, ...] | None, depth: int) -> Expr:
        expr = self.expression(kind, params, depth)
        try:
            return nystrom(expr, self.draw(st.integers(1, 3)), seed=self.draw(st.integers(0, 2)))
        except ExpressionError:  # known not to be positive semi-definite
            return expr

    def whole(self, kind: Kind, params: tuple[str, ...] | None, depth: int) -> Expr:
        groups = st.lists(self.names, min_size=1, max_size=2).map(tuple)
        by = self.draw(st.one_of(st.sampled_from(["parameter", "module"]), groups))
        expr = self.expression(kind, params, depth)
        return expr if expr.domain is None else block_diagonal(expr, by=by)

    def blocks(self, kind: Kind, params: tuple[str, ...] | None, depth: int) -> Expr:
        chosen = self.draw(st.lists(self.names, min_size=1, max_size=2))
        if self.draw(st.booleans()):
            return block_diagonal({names[0]: self.expression(kind, None, depth) for names in chosen})
        inner = [self.draw(st.sampled_from((None, names))) for names in chosen]
        exprs = [self.expression(kind, within, depth) for within in inner]
        joint = [self.draw(st.booleans()) for _ in chosen]
        return block_diagonal([Block(n, e, joint=j) for n, e, j in zip(chosen, exprs, joint, strict=True)])


INVERSE_OPTIONS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "solver": st.sampled_from(SOLVERS[1:]),
        "rtol": st.floats(0, 1),
        "atol": st.floats(0, 1),
        "maxiter": st.integers(1, 999),
        "on_fail": st.just("warn"),
        "check": st.just(False),
    },
)

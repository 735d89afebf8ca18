"""Sums: canonical linear combinations."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from curvalg.errors import ExpressionError
from curvalg.expr.facts import Facts, LossFacts, Tri
from curvalg.expr.node import Expr, require_hashable
from curvalg.expr.nodes.composite import Composite, Side, shape, side, square
from curvalg.expr.nodes.constants import Identity, IdentityExpr, Zero, ZeroExpr, zero_between
from curvalg.expr.nodes.transposes import symmetric_form
from curvalg.expr.scalars import as_coefficient


class Sum(Composite):
    """A canonical linear combination Σ cᵢ Aᵢ + shift · I.

    Made by ``+``, ``-`` and scaling. Flattened, unordered, equal terms merged, the identity held apart; coefficients
    are exact fractions. Two sums are equal when their coefficients are, in whatever order they were written.

    Args:
        coefficients: term -> coefficient, none zero.
        shift: coefficient of the identity.
        space: the zero that stands for the size where every term that had one cancelled.
    """

    def __init__(self, coefficients: Mapping[Expr, Fraction], shift: Fraction, space: ZeroExpr | None = None) -> None:
        object.__setattr__(self, "coefficients", MappingProxyType(dict(coefficients)))
        object.__setattr__(self, "shift", shift)
        object.__setattr__(self, "space", space)
        self.__post_init__()

    coefficients: Mapping[Expr, Fraction]
    shift: Fraction
    space: ZeroExpr | None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"expressions are immutable; cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"expressions are immutable; cannot delete {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        # The hash of strings differs between processes: rebuild it rather than pickle it.
        return Sum, (dict(self.coefficients), self.shift, self.space)

    def content(self, of: Callable[[Expr], Hashable]) -> Hashable:
        return frozenset((of(part), c) for part, c in self.coefficients.items()), self.shift, self.space

    def find_sides(self) -> tuple[Side, Side]:
        typed = next((e for e in self.coefficients if e.domain is not None), self.space or Identity)
        return side(typed, "codomain"), side(typed, "domain")

    @property
    def children(self) -> tuple[Expr, ...]:
        return tuple(self.coefficients)

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        pairs: list[tuple[Expr, Any]] = list(zip(children, self.coefficients.values(), strict=True))
        return add([*pairs, (Identity, self.shift), *([] if self.space is None else [(self.space, 1)])])

    def transposed(self, of: Callable[[Expr], Expr]) -> Expr:
        # The space is square, for what is left beside it is a multiple of the identity.
        return self.rebuild(tuple(of(child) for child in self.coefficients))

    def find_facts(self, loss: LossFacts | None) -> Facts:
        if self.domain != self.codomain:
            return Facts(symmetric=False)
        if not self.coefficients:
            return Facts(symmetric=True, psd=self.shift >= 0, positive_definite=self.shift > 0)
        parts = [(child.facts(loss), c > 0) for child, c in self.coefficients.items()]
        psd = all(facts.psd and positive for facts, positive in parts) and self.shift >= 0
        definite = psd and (self.shift > 0 or any(facts.positive_definite for facts, _ in parts))
        if psd:
            return Facts(psd=True, positive_definite=definite or None)
        # One definite matrix with a negative sign and nothing to make up for it: certainly not positive.
        negative = self.shift <= 0 and all(facts.psd and not positive for facts, positive in parts)
        negative = negative and (self.shift < 0 or any(facts.positive_definite for facts, _ in parts))
        symmetric = self._symmetric([facts.symmetric for facts, _ in parts], loss)
        return Facts(symmetric=symmetric, psd=False if negative else None)

    def _symmetric(self, parts: Sequence[Tri], loss: LossFacts | None) -> Tri:
        if all(parts) or symmetric_form(self, loss) is not None:
            return True
        # One asymmetric part cannot be made up for by symmetric ones; two may cancel.
        return False if parts.count(True) == len(parts) - 1 and False in parts else None


def add(pairs: Iterable[tuple[Expr, Any]]) -> Expr:
    """The canonical form of Σ cᵢ Aᵢ.

    Raises:
        ExpressionError: the terms do not act between the same spaces.
    """
    coefficients: dict[Expr, Fraction] = {}
    shift = Fraction(0)
    typed: Expr | None = None
    for expr, scale in pairs:
        scale = as_coefficient(scale)
        if not expr.children:
            require_hashable(expr)
        parts: Mapping[Expr, Fraction] = {expr: Fraction(1)}
        if isinstance(expr, Sum):
            parts, shift = expr.coefficients, shift + scale * expr.shift
        elif isinstance(expr, IdentityExpr):
            parts, shift = {}, shift + scale
        elif isinstance(expr, ZeroExpr):
            parts = {}
        if expr.domain is not None:
            typed = _agree(typed, expr)
        for part, coefficient in parts.items():
            coefficients[part] = coefficients.get(part, Fraction(0)) + scale * coefficient
    coefficients = {expr: c for expr, c in coefficients.items() if c}
    sizeless = Identity if shift else next((expr for expr in coefficients if expr.domain is None), None)
    if sizeless is not None and typed is not None and not square(typed):
        raise ExpressionError(f"{sizeless} is square; it cannot be added to {typed}, which is {shape(typed)}")
    zero = None if typed is None else zero_between(typed, typed)
    if not coefficients:
        if not shift:
            return zero or Zero
        return Identity if shift == 1 and zero is None else Sum({}, shift, zero)
    # What is left may have no size of its own, as the inverse of a multiple of the identity.
    space = zero if all(expr.domain is None for expr in coefficients) else None
    if not shift and space is None and list(coefficients.values()) == [1]:
        return next(iter(coefficients))
    return Sum(coefficients, shift, space)


def _agree(typed: Expr | None, expr: Expr) -> Expr:
    if typed is None:
        return expr
    if side(typed, "domain") != side(expr, "domain") or side(typed, "codomain") != side(expr, "codomain"):
        raise ExpressionError(
            f"cannot add operators between different spaces: {typed} is {shape(typed)}, {expr} is {shape(expr)}"
        )
    return typed

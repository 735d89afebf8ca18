"""Products and integer powers."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from curvalg.errors import ExpressionError, OptionError
from curvalg.expr.facts import Facts, LossFacts
from curvalg.expr.node import Expr
from curvalg.expr.nodes.composite import Composite, Side, shape, side, square
from curvalg.expr.nodes.constants import Identity, IdentityExpr, Zero, ZeroExpr, zero_between
from curvalg.expr.nodes.inverse import inverse
from curvalg.expr.nodes.sums import Sum, add
from curvalg.expr.nodes.transposes import symmetric_form

MAX_FACTORS = 10_000
"""The most factors of a product."""


@dataclass(frozen=True, repr=False, eq=False)
class Product(Composite):
    """A product of two or more factors, applied from right to left; made by ``@``."""

    factors: tuple[Expr, ...]

    def find_sides(self) -> tuple[Side, Side]:
        # A factor without a size of its own, as inverse(2 * Identity), takes its neighbour's.
        sized = [f for f in self.factors if f.domain is not None] or [self.factors[0]]
        return side(sized[0], "codomain"), side(sized[-1], "domain")

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.factors

    def content(self, of: Callable[[Expr], Hashable]) -> Hashable:
        return tuple(map(of, self.factors))

    def rebuild(self, children: tuple[Expr, ...]) -> Expr:
        return multiply(children)

    def transposed(self, of: Callable[[Expr], Expr]) -> Expr:
        return multiply(of(factor) for factor in reversed(self.factors))

    def find_facts(self, loss: LossFacts | None) -> Facts:
        if self.domain != self.codomain:
            return Facts(symmetric=False)
        form = symmetric_form(self, loss)
        if form is None:
            return Facts()
        if not isinstance(form, Product):  # a number came to its front
            return Facts(symmetric=True)
        # Aᵀ M A is positive semi-definite where M is, and Aᵀ A always; definite where all factors are, being invertible.
        facts = [factor.facts(loss) for factor in form.factors]
        psd = facts[len(facts) // 2].psd if len(facts) % 2 else True
        definite = all(f.positive_definite for f in facts)
        return Facts(symmetric=True, psd=psd or None, positive_definite=definite or None)


def multiply(factors: Iterable[Expr]) -> Expr:
    """The canonical form of A₁ @ A₂ @ …: flattened, numbers in front, identities dropped, zeros absorbing.

    Raises:
        ExpressionError: the spaces of neighbours do not match.
    """
    factors = list(factors)
    scale = Fraction(1)
    flat: list[Expr] = []
    for expr in factors:
        if isinstance(expr, Sum) and len(expr.coefficients) + bool(expr.shift) == 1 and expr.space is None:
            (part, coefficient), *_ = [*expr.coefficients.items(), (Identity, expr.shift)]
            scale *= coefficient
            expr = part
        if not isinstance(expr, IdentityExpr):
            flat.extend(expr.factors if isinstance(expr, Product) else [expr])
    _require_length(len(flat))
    sized = [expr for expr in flat if expr.domain is not None]
    for left, right in itertools.pairwise(sized):
        if side(left, "domain") != side(right, "codomain"):
            raise ExpressionError(
                f"cannot multiply ({left}) @ ({right}): the left one is {shape(left)}, the right one {shape(right)}"
            )
    if any(isinstance(expr, ZeroExpr) for expr in flat):
        return zero_between(sized[0], sized[-1]) if sized else Zero
    if not flat:
        return add([(Identity, scale)])
    product = flat[0] if len(flat) == 1 else Product(tuple(flat))
    return add([(product, scale)])


def _require_length(factors: int) -> None:
    if factors > MAX_FACTORS:
        raise OptionError(f"a product has at most {MAX_FACTORS} factors; this one would have more")


def power(base: Expr, exponent: Any) -> Expr:
    """``base ** exponent``: repeated products; the inverse for negative exponents.

    Raises:
        ExpressionError: the exponent is not an integer, or the base is not square.
    """
    if isinstance(exponent, bool) or not isinstance(exponent, numbers.Integral):
        raise OptionError(f"expected an integer power of an operator, got {exponent!r}")
    if not square(base):
        raise ExpressionError(f"a power needs a square operator; {base} is {shape(base)}")
    exponent = int(exponent)
    _require_length(abs(exponent) * (len(base.factors) if isinstance(base, Product) else 1))
    if exponent == 0:
        return add([(base, 0), (Identity, 1)])
    if exponent < 0:
        base = inverse(base)
    return multiply([base] * abs(exponent))

"""The canonical sum: one linear combination is one expression, however it was written."""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvalg.errors import ExpressionError
from curvalg.expr import GGN, Covariance, Diagonal, Expr, Hessian, Identity, Jacobian, Sum, Zero, inverse
from tests.support.strategies import coefficients, expressions, moderate

A, B, J = GGN(), Hessian(), Jacobian()
TERMS = (A, B, Covariance(), A @ B, Identity, inverse(A + Identity))
combinations = st.lists(st.tuples(st.sampled_from(TERMS), coefficients), min_size=1, max_size=6)


def total(parts: list[Expr], cut: Any) -> Expr:
    """The sum of parts, bracketed as ``cut`` draws."""
    if len(parts) == 1:
        return parts[0]
    at = cut(st.integers(1, len(parts) - 1))
    return total(parts[:at], cut) + total(parts[at:], cut)


@settings(max_examples=150, deadline=None)
@given(combinations, st.data())
def test_any_order_and_bracketing_is_one_expression(combination: list[tuple[Expr, Any]], data: st.DataObject) -> None:
    parts = [scale * term for term, scale in combination]
    plain = functools.reduce(lambda a, b: a + b, parts)
    other = total(data.draw(st.permutations(parts)), data.draw)
    assert other == plain
    assert hash(other) == hash(plain)


@settings(max_examples=100, deadline=None)
@given(combinations, moderate)
def test_scaling_distributes(combination: list[tuple[Expr, Any]], scale: Fraction) -> None:
    parts = [c * term for term, c in combination]
    whole = functools.reduce(lambda a, b: a + b, parts)
    assert scale * whole == functools.reduce(lambda a, b: a + b, [scale * part for part in parts])
    assert whole / scale == (1 / scale) * whole
    assert -whole == -1 * whole


@settings(max_examples=100, deadline=None)
@given(expressions())
def test_what_is_subtracted_from_itself_is_a_zero_that_keeps_its_spaces(expr: Expr) -> None:
    zero = expr - expr
    assert (zero.domain, zero.codomain) == (expr.domain, expr.codomain)
    assert zero == 0 * expr
    assert expr + zero == expr


def test_decimals_are_exact() -> None:
    assert 0.1 * A + 0.2 * A == 0.3 * A
    assert sum([0.1 * A] * 9, start=0.1 * A) == A
    assert A / 3 + A / 3 + A / 3 == A
    assert A / 3 * 3 == A
    assert 1e-3 * A == A / 1000
    assert np.float32(0.1) * A == 0.1 * A
    assert (2 * A / 6).coefficients == {A: Fraction(1, 3)}  # type: ignore[attr-defined]


def test_the_identity_is_held_apart() -> None:
    expr = 2 * A / 2 + 0.5 * Identity
    assert expr == 0.5 * Identity + A
    assert isinstance(expr, Sum)
    assert (expr.coefficients, expr.shift) == ({A: 1}, Fraction(1, 2))
    assert expr - 0.5 * Identity == A
    assert Identity / 2 + Identity / 2 == Identity


def test_what_cancels_keeps_its_size() -> None:
    shift = A - A + 2 * Identity
    assert shift.domain == "parameters"
    assert shift != 2 * Identity
    left = A - A + inverse(2 * Identity)
    assert left.domain == "parameters"
    assert inverse(2 * Identity).domain is None
    with pytest.raises(ExpressionError):
        left @ J
    assert (inverse(2 * Identity) + A).domain == "parameters"
    assert (inverse(2 * Identity) @ J).codomain == "outputs"
    assert (J @ inverse(2 * Identity)).domain == "parameters"


def test_numbers_of_a_product_come_to_its_front() -> None:
    assert (2 * A) @ (B / 2) == A @ B
    assert (-A) @ (-B) == A @ B
    assert A @ (3 * Identity) @ B == 3 * (A @ B)
    assert (A @ B) @ A == A @ (B @ A)
    assert A**0 @ B == (A**0) @ B
    assert A**3 == A @ A @ A
    assert inverse(A) == A**-1
    assert A @ (B - B) == A - A
    assert Zero @ Zero == Zero


@pytest.mark.parametrize(
    "number",
    [2, 2.0, Fraction(2), np.int64(2), np.int8(2), np.float32(2), np.float64(2), np.array(2.0), torch.tensor(2.0)],
)
def test_any_real_scalar_scales(number: Any) -> None:
    for expr in (A * number, number * A, A / (1 / number)):
        assert expr == 2 * A
        assert str(expr) == "2*ggn"


@pytest.mark.parametrize("decimal", [0.1, 1e-3, 3.0, -0.7, 6.1e4])
@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_arrays_without_dimensions_are_their_shortest_decimal(decimal: float, kind: str) -> None:
    tensor = torch.tensor(decimal, dtype=getattr(torch, kind), requires_grad=True)
    for number in (tensor, tensor.detach(), np.array(decimal, dtype=kind), getattr(np, kind)(decimal)):
        assert number * A == A * number == decimal * A
        assert str(A * number) == str(decimal * A)


def test_precisions_mix() -> None:
    assert torch.tensor(0.1) * A + np.array(0.1, np.float32) * A + 0.1 * A == 0.3 * A


def test_numpy_integers_do_not_overflow() -> None:
    expr = np.int64(2**62) * A
    for _ in range(4):
        expr = expr * np.int64(2**62)
    assert expr == 2**310 * A


@pytest.mark.parametrize(
    "number", [True, "2", None, 1j, float("nan"), float("inf"), np.ones(2), np.bool_(True), torch.ones(2), [2]]
)
def test_nothing_else_scales(number: Any) -> None:
    for scale in (lambda: A * number, lambda: A / number, lambda: number * A):
        with pytest.raises(ExpressionError, match="expected a"):
            scale()


@pytest.mark.parametrize("number", [1e-3, 1, np.float64(2), np.ones(3), torch.ones(2), "a"])
def test_adding_a_number_is_refused(number: Any) -> None:
    for add in (lambda: A + number, lambda: number + A, lambda: A - number, lambda: number - A):
        with pytest.raises(ExpressionError, match=r"ambiguous; write A .* \* Identity"):
            add()


def test_leaves_are_merged_by_token() -> None:
    leaf, twin = Diagonal(np.ones(3)), Diagonal(np.ones(3))
    assert leaf + leaf == 2 * leaf
    assert leaf + twin != 2 * leaf


def test_pythons_sum_adds_expressions() -> None:
    assert sum([GGN(), Hessian()]) == GGN() + Hessian()
    assert sum([GGN()]) == GGN()
    for start in (1, 0.0, False, "0"):
        with pytest.raises(ExpressionError, match="ambiguous"):
            start + GGN()  # type: ignore[operator]

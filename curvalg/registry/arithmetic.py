"""Exact arithmetic of the numbers in a text, bounded in size."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from curvalg.errors import ExpressionError

MAX_BITS = 10_000
"""The longest number that a power of numbers may make."""

OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.MatMult: operator.matmul,
}
"""The operations on two operators, or on an operator and a number."""


def arithmetic(operation: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    """The exact result of an operation on two numbers.

    Raises:
        ExpressionError: not + - * / or an integer power, a division by zero, or a power that is too long to hold.

    >>> arithmetic(ast.Div(), Fraction(1), Fraction(3))
    Fraction(1, 3)
    """
    if isinstance(operation, ast.Pow):
        bits = max(left.numerator.bit_length(), left.denominator.bit_length())
        if right.denominator != 1 or abs(right) * bits > MAX_BITS:
            raise ExpressionError(f"expected an integer exponent that gives at most {MAX_BITS} bits, got {right}")
        if left == 0 and right < 0:
            raise ExpressionError("zero has no negative powers")
        return Fraction(left ** int(right))
    if isinstance(operation, ast.Div) and right == 0:
        raise ExpressionError("division by zero")
    if isinstance(operation, ast.MatMult) or type(operation) not in OPERATIONS:
        raise ExpressionError(f"{type(operation).__name__} is no operation on numbers here; use + - * / **")
    return Fraction(OPERATIONS[type(operation)](left, right))

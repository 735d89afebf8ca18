"""Coefficients: real scalars as exact fractions."""

from __future__ import annotations

import math
import numbers
from fractions import Fraction
from typing import Any

from curvalg.errors import ExpressionError, OptionError


def as_coefficient(value: Any) -> Fraction:
    """A real scalar as the exact fraction of its shortest decimal form, so that ``0.1`` means one tenth.

    Args:
        value: a Python or NumPy number, or an array or tensor without dimensions.

    Raises:
        ExpressionError: not a finite real number.

    >>> as_coefficient(0.1) + as_coefficient(0.2)
    Fraction(3, 10)
    """
    if isinstance(value, numbers.Rational) and not isinstance(value, bool):
        return Fraction(int(value.numerator), int(value.denominator))  # NumPy's integers would overflow
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item") and not isinstance(value, numbers.Real):
        value = _item(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise OptionError(f"expected a real number to scale an operator with, got {value!r}")
    if not math.isfinite(value):
        raise OptionError(f"expected a finite number to scale an operator with, got {value!r}")
    return Fraction(str(value))


def as_float(coefficient: Fraction) -> float:
    """The coefficient as a float.

    Raises:
        ExpressionError: out of a float's range.
    """
    try:
        value = float(coefficient)
    except OverflowError:
        value = math.inf
    if math.isinf(value) or (coefficient and not value):
        raise ExpressionError("a coefficient of the expression is beyond the range of floats")
    return value


def _item(array: Any) -> Any:
    """The element of a 0-d array or tensor, in the precision it was kept in."""
    item = array.item()
    kind = str(getattr(array, "dtype", "")).removeprefix("torch.")
    if kind not in ("float16", "float32"):
        return item
    # item() widens to double: a tenth in float32 would read 0.10000000149011612. NumPy's own scalars print as 0.1.
    import numpy as np

    return getattr(np, kind)(item)

"""Arguments that several estimators check."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from curvalg.errors import OptionError


def require_count(number: Any, name: str) -> int:
    """An integer of at least one.

    Raises:
        ExpressionError: something else.
    """
    if not isinstance(number, Integral) or isinstance(number, bool) or number < 1:
        raise OptionError(f"expected {name} to be an integer ≥ 1, got {number!r}")
    return int(number)


def require_tolerance(tol: Any) -> float:
    """A relative tolerance between zero and one, both excluded.

    Raises:
        ExpressionError: something else.
    """
    if not isinstance(tol, Real) or isinstance(tol, bool) or not 0 < float(tol) < 1:
        raise OptionError(f"expected a relative tolerance 0 < tol < 1, got {tol!r}")
    return float(tol)

"""Requests to estimators: checks of every keyword, and what to do with a result that misses its tolerance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from torch import Tensor

from curvalg.errors import ConvergenceError, CurvalgWarning, OptionError
from curvalg.estimate.result import Result
from curvalg.runs.run_file import FileName, require_place

OnFail = Literal["raise", "warn"]


@dataclass(frozen=True)
class Request:
    """The keywords that estimators share, checked.

    Args:
        seed: of random vectors.
        checkpoint: of the run, or None.
        progress: whether it is shown.
        on_fail: what to do where a tolerance is not reached.
        tol: relative, or None.
        exactness: whether a tolerance of zero asks for what rounding allows.
        products: to begin with; 1 for estimators that take as many as they need.
        maxiter: the most products, or None.

    Raises:
        ExpressionError: one of them makes no sense.
        CheckpointError: a place where no file can be written.
    """

    seed: int
    checkpoint: FileName | None
    progress: bool
    on_fail: OnFail = "raise"
    tol: float | None = None
    exactness: bool = False
    products: int = 1
    maxiter: int | None = None

    def __post_init__(self) -> None:
        require_count(self.products, "products")
        if self.tol is not None and not (_between(self.tol, 0, 1) and (self.exactness or self.tol)):
            allowed = "0 ≤ tol < 1" if self.exactness else "0 < tol < 1, or None"
            more = "; 0 asks for what rounding allows" if self.exactness else ""
            raise OptionError(f"expected a relative tolerance {allowed}, got {self.tol!r}{more}")
        if not _whole(self.seed):
            raise OptionError(f"expected seed to be an integer, got {self.seed!r}")
        if self.maxiter is not None and not (_whole(self.maxiter) and self.maxiter >= self.products):
            least = f"{self.products} (products=)" if self.products > 1 else "1"
            raise OptionError(f"expected maxiter to be a number of products ≥ {least}, or None, got {self.maxiter!r}")
        if self.on_fail not in ("raise", "warn"):
            raise OptionError(f"expected on_fail to be 'raise' or 'warn', got {self.on_fail!r}")
        require_place(self.checkpoint)

    def fail(self, message: str, result: Result, depth: int = 4) -> None:
        """Raise, or warn on behalf of the function that is so many calls above.

        Raises:
            ConvergenceError: with the result.
        """
        if self.on_fail == "raise":
            raise ConvergenceError(message, result)
        warnings.warn(message, CurvalgWarning, stacklevel=depth)


def require_count(number: Any, name: str) -> int:
    """Check that a value is an integer of at least one.

    Raises:
        ExpressionError: something else.
    """
    if not _whole(number) or number < 1:
        raise OptionError(f"expected {name} to be an integer ≥ 1, got {number!r}")
    return int(number)


def require_one_of(value: Any, name: str, known: Collection[Any], hint: str = "") -> None:
    """Check that a value is one of some words or numbers.

    Raises:
        ExpressionError: something else; the message ends with the hint.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value not in known:
        raise OptionError(f"expected {name} to be one of {', '.join(map(repr, known))}, got {value!r}{hint}")


def require_auto(method: Any, quantity: str) -> None:
    """Check that no method is chosen for a quantity that has but one.

    Raises:
        ExpressionError: another than "auto".
    """
    if not isinstance(method, str) or method != "auto":
        raise OptionError(f"expected method='auto' for {quantity}, got {method!r}; leave it out")


def require_pairs(k: Any, most: int | None = None, of: str = "") -> int:
    """Check a number of eigenvalues or singular values, with its upper limit where that is known.

    Raises:
        ExpressionError: no integer, or one that is out of range.
    """
    if not _whole(k):
        raise OptionError(f"expected an integer k ≥ 1, got {k!r}")
    if most is not None and not 1 <= k <= most:
        raise OptionError(f"expected 1 ≤ k ≤ {most} for {of}, got k={k}")
    return int(k)


def require_block(block: Any) -> int | Literal["auto"]:
    """Check a number of vectors to be multiplied at once.

    Raises:
        ExpressionError: neither "auto" nor an integer of at least one.
    """
    if isinstance(block, str) and block == "auto":
        return "auto"
    if not (_whole(block) and block >= 1):
        raise OptionError(f"expected block to be 'auto' or an integer ≥ 1, got {block!r}")
    return int(block)


def require_outliers(outliers: Any, size: int) -> int:
    """Check a number of eigenvalues to be computed one by one.

    Raises:
        ExpressionError: no integer, or all of them.
    """
    if not _whole(outliers):
        raise OptionError(f"expected outliers to be a number of eigenvalues, got {outliers!r}")
    if not 0 <= outliers < size:
        raise OptionError(
            f"expected 0 ≤ outliers < {size} for {size} rows, got {outliers}; all eigenvalues are given by eigsh"
        )
    return int(outliers)


def require_grid(grid: Any, scale: str) -> None:
    """Check a number of points, or the points.

    Raises:
        ExpressionError: points that do not ascend, or have no place on the scale.
    """
    if not isinstance(grid, Tensor):
        require_count(grid, "grid")
        return
    if grid.ndim != 1 or not len(grid) or not bool((grid.diff() > 0).all()):
        raise OptionError(f"expected ascending points (g,), got a tensor of shape {tuple(grid.shape)}")
    if scale == "log" and not bool((grid > 0).all()):
        raise OptionError("expected positive points on a log scale, which shows |λ| + floor; leave out the others")


def require_positive(number: Any, what: str, hint: str = "", *, zero: bool = False) -> float:
    """Check that a value is a finite number above zero; it is described in words such as "a width > 0".

    Raises:
        ExpressionError: something else, or zero where that is not allowed; the message ends with the hint.
    """
    if not (_between(number, 0, math.inf) and (zero or number)):
        raise OptionError(f"expected {what}, got {number!r}{hint}")
    return float(number)


def require_enough(products: int, method: str, least: int, why: str) -> None:
    """Check that there are as many products as a method takes.

    Raises:
        ExpressionError: fewer.
    """
    if products < least:
        raise OptionError(
            f"expected products ≥ {least} for method {method!r} ({why}), got products={products}; raise products=, or "
            "leave out method=, which takes what the products suffice for"
        )


def _whole(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


def _between(number: Any, low: float, high: float) -> bool:
    """Whether a value is a real number low ≤ number < high."""
    return isinstance(number, Real) and not isinstance(number, bool) and low <= float(number) < high

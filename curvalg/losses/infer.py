"""Whether a callable averages or sums over the rows of a batch, found by trying."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from curvalg.errors import LossError
from curvalg.losses.additive import (
    COUPLED,
    adds_up,
    causes,
    number,
    perturbed,
    repeat,
    row_count,
    tolerance_of,
    whole_and_parts,
)
from curvalg.losses.calls import name_of
from curvalg.losses.loss import Reduction, Structure


def infer_reduction(fn: Callable[[Any, Any], Any], output: Structure, target: Structure) -> Reduction:
    """The reduction of a callable: ``"mean"`` if it does not change when a batch is repeated, ``"sum"`` if it doubles.

    Then it is checked on two parts of the batch: n ℓ = n₁ ℓ₁ + n₂ ℓ₂ for a mean, ℓ = ℓ₁ + ℓ₂ for a sum. A batch of
    one row cannot be split.

    Args:
        fn: a callable (output, target) → scalar.
        output: any structure of tensors with n rows each.
        target: any structure; tensors with n rows are repeated and split along.

    Raises:
        LossError: if neither fits; then the reduction has to be said.

    >>> infer_reduction(torch.nn.functional.mse_loss, torch.ones(3, 2), torch.zeros(3, 2))
    'mean'
    """
    rows = row_count(output)
    if not rows:
        raise _undecided(fn, "the batch has no rows")
    counts = [rows // 2, rows - rows // 2] if rows > 1 else []
    tolerance = tolerance_of(output)
    with torch.no_grad(), _failing(fn):
        for candidate in (output, perturbed(output)):
            value = _finite(fn, number(fn, candidate, target))
            parts = [_finite(fn, part) for part in whole_and_parts(fn, candidate, target, counts)[1]] if counts else []
            # A value of zero, or one that cancels to zero, is equal to its double.
            if abs(value) > tolerance * max(map(abs, parts), default=0.0):
                twice = _finite(fn, number(fn, repeat(candidate, rows), repeat(target, rows)))
                reduction = _decide(fn, value, twice, tolerance)
                if parts and not adds_up(reduction, value, parts, counts, tolerance):
                    raise _undecided(
                        fn,
                        f"its values {parts[0]:.6g} and {parts[1]:.6g} on two parts of a batch do not make up its "
                        f"{reduction} {value:.6g} ({causes(output, target)})",
                    )
                return reduction
    raise _undecided(fn, "its value is zero on the batch, and near it")


@contextmanager
def _failing(fn: Callable[..., Any]) -> Iterator[None]:
    """Whatever the callable raises on a batch, on it repeated or on parts of it, as an error that says so."""
    try:
        yield
    except LossError:
        raise
    except Exception as error:
        raise _undecided(fn, f"it fails on a batch, on it repeated, or on a part of it ({error})") from error


def _decide(fn: Callable[..., Any], value: float, twice: float, tolerance: float) -> Reduction:
    if math.isclose(twice, value, rel_tol=tolerance):
        return "mean"
    if math.isclose(twice, 2 * value, rel_tol=tolerance):
        return "sum"
    raise _undecided(fn, f"it is {value:.6g} on a batch and {twice:.6g} on that batch repeated")


def _finite(fn: Callable[..., Any], value: float) -> float:
    if not math.isfinite(value):
        raise _undecided(fn, f"its value on a batch is {value}")
    return value


def _undecided(fn: Callable[..., Any], why: str) -> LossError:
    return LossError(
        f"cannot find whether {name_of(fn)} is a mean or a sum over samples: {why}. Pass reduction='mean' or "
        f"reduction='sum', or a Loss whose numerators and denominators add up over batches. {COUPLED}"
    )

"""Whether a callable averages or sums over the rows of a batch, found by trying."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from curvalg.errors import LossError
from curvalg.problem.losses.base import Reduction, Structure


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
    leaves = [leaf for leaf in optree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.ndim > 0]
    if not leaves or len(leaves[0]) == 0:
        raise _undecided(fn, "the batch has no rows")
    rows, tolerance = len(leaves[0]), _tolerance(leaves[0].dtype)
    with torch.no_grad():
        for candidate in (output, _perturbed(output)):
            value = _number(fn, candidate, target)
            parts = _parts(fn, candidate, target, rows)
            # A value of zero, or one that cancels to zero, is equal to its double.
            if abs(value) > tolerance * max(map(abs, parts), default=0.0):
                twice = _number(fn, *(_repeated(tree, rows) for tree in (candidate, target)))
                return _decide(fn, value, twice, parts, rows, tolerance)
    raise _undecided(fn, "its value is zero on the batch, and near it")


def _decide(
    fn: Callable[..., Any], value: float, twice: float, parts: list[float], rows: int, tolerance: float
) -> Reduction:
    reduction: Reduction
    if math.isclose(twice, value, rel_tol=tolerance):
        reduction, weights, whole = "mean", [rows // 2, rows - rows // 2], rows
    elif math.isclose(twice, 2 * value, rel_tol=tolerance):
        reduction, weights, whole = "sum", [1, 1], 1
    else:
        raise _undecided(fn, f"it is {value:.6g} on a batch and {twice:.6g} on that batch repeated")
    if not parts:
        return reduction
    terms = [weight * part for weight, part in zip(weights, parts, strict=True)]
    scale = max(abs(whole * value), *map(abs, terms))
    if not math.isclose(sum(terms), whole * value, rel_tol=tolerance, abs_tol=tolerance * scale):
        raise _undecided(
            fn,
            f"its values {parts[0]:.6g} and {parts[1]:.6g} on two parts of a batch do not make up its {reduction} "
            f"{value:.6g} (samples are coupled, or rows weighted unequally, as by class weights or ignored labels)",
        )
    return reduction


def _parts(fn: Callable[..., Any], output: Structure, target: Structure, rows: int) -> list[float]:
    if rows == 1:
        return []
    half = rows // 2
    return [
        _number(fn, *(_rows(tree, rows, part) for tree in (output, target)))
        for part in (slice(0, half), slice(half, rows))
    ]


def _number(fn: Callable[..., Any], output: Structure, target: Structure) -> float:
    value = fn(output, target)
    if not isinstance(value, Tensor) or value.numel() != 1:
        came = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise LossError(f"{_name(fn)}: expected a scalar tensor, got {came}; sum or average over it.")
    number = float(value)
    if not math.isfinite(number):
        raise _undecided(fn, f"its value on a batch is {number}")
    return number


def _has_rows(leaf: object, rows: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == rows


def _repeated(tree: Structure, rows: int) -> Structure:
    return optree.tree_map(lambda leaf: torch.cat([leaf, leaf]) if _has_rows(leaf, rows) else leaf, tree)


def _rows(tree: Structure, rows: int, part: slice) -> Structure:
    return optree.tree_map(lambda leaf: leaf[part] if _has_rows(leaf, rows) else leaf, tree)


def _perturbed(tree: Structure) -> Structure:
    """The tree away from where it is, by numbers that look like noise but are the same every time."""

    def shift(leaf: object) -> object:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        steps = torch.arange(1, leaf.numel() + 1, dtype=leaf.dtype, device=leaf.device)
        return leaf + (0.5 + 0.3 * torch.cos(steps * 1.7)).reshape(leaf.shape)

    return optree.tree_map(shift, tree)


def _tolerance(dtype: torch.dtype) -> float:
    return math.sqrt(torch.finfo(dtype).eps) if dtype.is_floating_point else 1e-4


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)


def _undecided(fn: Callable[..., Any], why: str) -> LossError:
    return LossError(
        f"Cannot tell whether {_name(fn)} is a mean or a sum over samples: {why}. Pass reduction='mean' or "
        "reduction='sum', or a Loss whose numerators and denominators add up over batches."
    )

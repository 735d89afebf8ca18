"""Whether a callable adds up over the rows of a batch, and from batch to batch, found by trying.

A mean over rows has n ℓ = n₁ ℓ₁ + n₂ ℓ₂ on two parts of a batch, a sum ℓ = ℓ₁ + ℓ₂. Class weights, ignored labels,
couplings between samples and shapes that broadcast break that, and with it every denominator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from curvalg.errors import LossError
from curvalg.losses.calls import call, name_of
from curvalg.losses.loss import Reduction, Structure
from curvalg.tensors import trees

Fn = Callable[[Any, Any], Any]

COUPLED = (
    "A loss in which samples see each other (contrastive, triplet) works in two ways: let forward=lambda model, batch: ... "
    "return what has one loss for each row, as the matrix of similarities z @ z.T of the batch, to be classified by "
    "CrossEntropy; or make the batch one row, with forward=lambda model, batch: model(batch[0])[None] and "
    "target=lambda batch: batch[1][None]"
)
"""The cure for losses that couple samples."""


def check_additive(fn: Fn, reduction: Reduction, output: Structure, target: Structure) -> None:
    """Compare the value on a batch with those on its halves, and on its first row and the others.

    Nothing is compared where there is one row, or where a tensor of the target has another leading axis than the output
    and so belongs to no rows.

    Args:
        fn: a callable (output, target) → scalar.
        reduction: what it is taken for.
        output: any structure of tensors with n rows each.
        target: any structure of tensors.

    Raises:
        LossError: the values do not add up, or the callable fails on a part.

    >>> output, target = torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 5.0])
    >>> check_additive(lambda z, y: (z[:, 0] - y).square().mean(), "mean", output, target)
    >>> check_additive(lambda z, y: (z - y).square().mean(), "mean", output, target)
    Traceback (most recent call last):
    ...
    curvalg.errors.LossError: <lambda> is no mean over the rows of a batch: ...
    """
    rows = row_count(output)
    if rows < 2 or any(t.ndim and len(t) != rows for t in trees.tensors(target)):
        return
    _check(fn, reduction, output, target, (rows // 2, rows - rows // 2), "the two halves of it")
    if rows > 2:  # halves alone hide weights that balance between them
        _check(fn, reduction, output, target, (1, rows - 1), "its first row and the other ones")


def check_additive_pair(
    fn: Fn, reduction: Reduction, output1: Structure, target1: Structure, output2: Structure, target2: Structure
) -> None:
    """Compare the value on two batches put together with those on each.

    This sees what no single batch shows, such as class weights where every batch has one class. Nothing is compared
    where the batches do not fit together, because trailing axes or tensors without rows differ.

    Args:
        fn: a callable (output, target) → scalar.
        reduction: what it is taken for.
        output1: any structure of tensors with n₁ rows each.
        target1: any structure of tensors.
        output2: as ``output1``, of another batch.
        target2: as ``target1``, of another batch.

    Raises:
        LossError: the values do not add up, or the callable fails on the batches put together.
    """
    counts = row_count(output1), row_count(output2)
    output, target = _joined(output1, output2, counts), _joined(target1, target2, counts)
    if 0 in counts or output is None or target is None:
        return
    _check(fn, reduction, output, target, counts, "the two batches that it is made of")


def adds_up(
    reduction: Reduction, whole: float, parts: Sequence[float], counts: Sequence[int], tolerance: float
) -> bool:
    """Whether values on the parts of a batch, with so many rows each, make up the value on the whole."""
    weights, total = (counts, sum(counts)) if reduction == "mean" else ([1] * len(counts), 1)
    terms = [weight * part for weight, part in zip(weights, parts, strict=True)]
    scale = max(abs(total * whole), *map(abs, terms))
    return math.isclose(sum(terms), total * whole, rel_tol=tolerance, abs_tol=tolerance * scale)


def whole_and_parts(fn: Fn, output: Structure, target: Structure, counts: Sequence[int]) -> tuple[float, list[float]]:
    """The value on a batch, and the values on parts of it with the given numbers of rows."""
    rows, start, parts = sum(counts), 0, []
    for count in counts:
        part = slice(start, start + count)
        parts.append(number(fn, take(output, rows, part), take(target, rows, part)))
        start += count
    return number(fn, output, target), parts


def number(fn: Fn, output: Structure, target: Structure) -> float:
    """The value of a callable, which may be NaN.

    Raises:
        LossError: it is no scalar tensor.
    """
    # A copy of the output, for callables that work in place.
    value = call(fn, trees.tensor_map(torch.clone, output), target)
    if not isinstance(value, Tensor) or value.numel() != 1:
        came = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise LossError(f"{name_of(fn)}: expected a scalar tensor, got {came}; sum or average over it")
    return float(value)


def row_count(output: Structure) -> int:
    """The number of rows of an output's first tensor; 0 if there is none."""
    return trees.rows(output) or 0


def take(tree: Structure, rows: int, part: slice) -> Structure:
    """Some rows of every tensor that has the given number of rows."""
    return trees.tensor_map(lambda t: t[part] if _has_rows(t, rows) else t, tree)


def repeat(tree: Structure, rows: int) -> Structure:
    """Every tensor that has the given number of rows, repeated once along them."""
    return trees.tensor_map(lambda t: torch.cat([t, t]) if _has_rows(t, rows) else t, tree)


def perturbed(tree: Structure) -> Structure:
    """The tree moved by numbers that look like noise but are the same every time."""

    def shift(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        steps = torch.arange(1, t.numel() + 1, dtype=t.dtype, device=t.device)
        return t + (0.5 + 0.3 * torch.cos(steps * 1.7)).reshape(t.shape)

    return trees.tensor_map(shift, tree)


def tolerance_of(output: Structure) -> float:
    """The relative error below which sums of rounded values count as equal."""
    dtype = next(t.dtype for t in trees.tensors(output) if t.ndim)
    return math.sqrt(torch.finfo(dtype).eps) if dtype.is_floating_point else 1e-4


def causes(output: Structure, target: Structure) -> str:
    """The reasons for which a callable is no mean or sum over rows, for messages."""
    text = "samples are coupled or drawn at random, or rows weighted unequally, as by class weights or ignored labels"
    if not isinstance(output, Tensor) or not isinstance(target, Tensor):
        return text
    shapes = f"output {tuple(output.shape)} and target {tuple(target.shape)}"
    if output.shape != target.shape and (joint := _broadcast(output, target)) is not None:
        return f"{shapes} broadcast to {joint}: use target.reshape({tuple(output.shape)}), or else {text}"
    return f"{text}, or shapes do not fit: {shapes}"


def _broadcast(output: Tensor, target: Tensor) -> tuple[int, ...] | None:
    """The shape that two tensors of equally many entries broadcast to."""
    if output.numel() != target.numel():
        return None
    try:
        return tuple(torch.broadcast_shapes(output.shape, target.shape))
    except RuntimeError:
        return None


def _check(
    fn: Fn, reduction: Reduction, output: Structure, target: Structure, counts: tuple[int, int], which: str
) -> None:
    """Compare the value on all rows with those on the first and the other ones."""
    tolerance = tolerance_of(output)
    with torch.no_grad():
        try:
            value, parts = whole_and_parts(fn, output, target, counts)
        except LossError:
            raise
        except Exception as error:
            raise LossError(
                f"{name_of(fn)} fails on {which}: {error}. A loss is called with any number of rows; write it so. {COUPLED}"
            ) from error
        if adds_up(reduction, value, parts, counts, tolerance):
            return
        # Values that cancel leave rounding errors, which add up to nothing; away from there they do.
        if all(map(math.isfinite, (value, *parts))):
            try:
                elsewhere = whole_and_parts(fn, perturbed(output), target, counts)
            except Exception:
                elsewhere = math.nan, [math.nan, math.nan]  # out of the loss's domain
            if adds_up(reduction, *elsewhere, counts, tolerance):
                return
    raise LossError(
        f"{name_of(fn)} is no {reduction} over the rows of a batch: it is {value:.6g} on a batch, but {parts[0]:.6g} and "
        f"{parts[1]:.6g} on {which} ({causes(output, target)}). For class weights and ignored labels use a Loss whose "
        "numerators and denominators add up, such as CrossEntropy with these options; a callable that sums over the rows "
        f"is declared by reduction='sum'. {COUPLED}"
    )


def _joined(left: Structure, right: Structure, counts: tuple[int, int]) -> Structure | None:
    """Two structures put together row by row, or None if they do not fit."""
    (first, form), (second, _) = trees.flatten(left), trees.flatten(right)
    if len(first) != len(second):
        return None
    joined = []
    for a, b in zip(first, second, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            joined.append(a)
        elif a.ndim and b.ndim and (len(a), len(b)) == counts and a.shape[1:] == b.shape[1:]:
            joined.append(torch.cat([a, b]))
        elif torch.equal(a, b) and not _has_rows(a, sum(counts)):
            joined.append(a)
        else:
            return None
    return trees.unflatten(form, joined)


def _has_rows(t: Tensor, rows: int) -> bool:
    return t.ndim > 0 and len(t) == rows

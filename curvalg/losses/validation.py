"""Validation that the losses share: every message says what was expected, what came, and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from curvalg.errors import LossError

_SETTLED: ContextVar[bool] = ContextVar("settled", default=False)


@contextmanager
def settled() -> Iterator[None]:
    """Look at no values inside: they were found allowed before, and a look would wait for their device."""
    token = _SETTLED.set(True)
    try:
        yield
    finally:
        _SETTLED.reset(token)


def some(wrong: Tensor) -> bool:
    """Whether any entry is True; False without a look where values are settled."""
    return not _SETTLED.get() and bool(wrong.any())


def check_reduction(name: str, reduction: object, allowed: Sequence[str] = ("mean", "sum")) -> None:
    """Raise LossError unless the reduction is one of those allowed."""
    if reduction == "none":
        raise LossError(
            f"{name}: reduction='none' gives no scalar to differentiate; use reduction='mean' or reduction='sum'"
        )
    if reduction not in allowed:
        raise LossError(f"{name}: expected reduction to be one of {', '.join(map(repr, allowed))}, got {reduction!r}")


def floating(name: str, tensor: object, what: str = "output") -> Tensor:
    """The output of a model as a detached tensor with a sample axis and real floating-point entries."""
    if not isinstance(tensor, Tensor):
        raise LossError(
            f"{name}: expected the {what} to be one tensor, got {type(tensor).__name__}; "
            "have the model (or Problem's forward=) return the tensor that the loss reads"
        )
    if not tensor.is_floating_point():
        raise LossError(f"{name}: expected a real floating-point {what}, got {tensor.dtype}; convert it with .float()")
    if tensor.ndim == 0:
        raise LossError(f"{name}: expected a {what} whose first axis holds the samples, got a scalar; unsqueeze it")
    return tensor.detach()


def real_target(name: str, target: object) -> Tensor:
    """The target as a detached real tensor."""
    if not isinstance(target, Tensor):
        raise LossError(
            f"{name}: expected the target to be one tensor, got {type(target).__name__}; "
            "pass Problem's target= to pick it from a batch (a tuple is one batch: several batches are a list [...])"
        )
    if target.is_complex():
        raise LossError(f"{name}: expected a real target, got {target.dtype}; split it into real and imaginary parts")
    return target.detach()


def same_shape(name: str, output: Tensor, target: Tensor, what: str = "output") -> None:
    """Raise LossError unless the shapes agree; torch would broadcast (N,) against (N, 1) to (N, N)."""
    if output.shape == target.shape:
        return
    shapes = f"{what} {tuple(output.shape)} and target {tuple(target.shape)}"
    cure = "make the model's output and the target agree."
    if output.numel() == target.numel():
        cure = f"use target.reshape({tuple(output.shape)}), or reshape the {what} in the model."
    raise LossError(f"{name}: expected {what} and target of the same shape, got {shapes} (not broadcast here); {cure}")


def check_range(name: str, tensor: Tensor, allowed: Tensor, expected: str) -> None:
    """Raise LossError naming the first entry of ``tensor`` where ``allowed`` is False."""
    if not some(~allowed):
        return
    place = tuple(torch.nonzero(~allowed)[0].tolist())
    raise LossError(f"{name}: expected {expected}, got {tensor[place].item()} at {place}")


def check_weight(name: str, option: str, weight: object) -> None:
    """Raise LossError unless an option is None or a floating-point tensor."""
    if weight is None or (isinstance(weight, Tensor) and weight.is_floating_point()):
        return
    kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
    raise LossError(f"{name}: expected {option} to be a floating-point tensor or None, got {kind}")


def check_nonnegative(name: str, tensor: Tensor, cure: str) -> None:
    """Raise LossError if a diagonal of B (or a mass in front of it) has a negative entry."""
    if some(tensor < 0):
        raise LossError(
            f"{name}: a square root needs a positive semi-definite Hessian, but a weight or second derivative is "
            f"{tensor.min().item()}; {cure}"
        )

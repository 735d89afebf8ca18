"""The precision that was asked for, and whether it is available."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

from curvalg.errors import ProblemError
from curvalg.tensors.memory import widest


def accumulating(dtype: torch.dtype | None, own: torch.dtype, device: torch.device) -> torch.dtype | None:
    """The dtype of sums over batches.

    Args:
        dtype: asked for.
        own: of the products.
        device: of the problem.

    Raises:
        ProblemError: it is narrower than the products, or the device does not have it.
    """
    if dtype is None:
        return None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or torch.promote_types(dtype, own) != dtype:
        raise ProblemError(
            f"accumulate is a dtype at least as wide as that of the products, {own}, or None; got {dtype!r}"
        )
    if dtype == torch.float64 != widest(device):
        raise ProblemError("this device has no float64; leave accumulate out, or move the model to the CPU")
    return dtype


def compiler(compile: bool | str) -> str | None:
    """The backend of ``torch.compile``, or None where nothing is compiled.

    Raises:
        ProblemError: no such backend.
    """
    if isinstance(compile, bool):
        return "inductor" if compile else None
    known = torch.compiler.list_backends(exclude_tags=())
    if compile not in known:
        raise ProblemError(
            f"compile is True, False or a backend of torch.compile, one of {sorted(known)}; got {compile!r}"
        )
    return compile


def casting(dtype: torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """The dtype that the model is cast to.

    Raises:
        ProblemError: autocast has no such dtype on the device.
    """
    if dtype is None or dtype in (torch.bfloat16, torch.float16):
        return dtype
    raise ProblemError(
        f"autocast is torch.bfloat16, torch.float16 or None, got {dtype!r}; on {device} it casts to no other"
    )


def derivatives(kinds: Sequence[str]) -> AbstractContextManager[Any]:
    """A context with gradients on, inference mode and autocast off.

    Args:
        kinds: of devices.
    """
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    for kind in kinds:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def autocasting(kinds: Sequence[str], dtype: torch.dtype) -> AbstractContextManager[Any]:
    """A context under autocast.

    Args:
        kinds: of devices.
        dtype: that is cast to.
    """
    stack = ExitStack()
    for kind in kinds:
        # Without the cache of cast weights: it outlives the tangents and exchanged parameters of one call.
        stack.enter_context(torch.autocast(kind, dtype, cache_enabled=False))
    return stack

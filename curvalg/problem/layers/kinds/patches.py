"""The patches that convolutions multiply with their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """All windows of a padded image, as a view.

    Args:
        x: (N, channels, *size).
        kernel: size of the windows.
        stride: between windows.
        dilation: between the elements of a window.

    Returns:
        (N, *places, channels, *kernel).
    """
    x = x.contiguous()
    batch, channels, *size = x.shape
    axes = range(len(kernel))
    places = [(size[a] - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1 for a in axes]
    steps = x.stride()[2:]
    return x.as_strided(
        (batch, *places, channels, *kernel),
        (
            x.stride(0),
            *(steps[a] * stride[a] for a in axes),
            x.stride(1),
            *(steps[a] * dilation[a] for a in axes),
        ),
    )


def padded(x: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """The tensor with zeros around its last axes; negative numbers cut off."""
    pairs = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    return F.pad(x, pairs) if any(pairs) else x


def spread_out(x: Tensor, stride: Sequence[int]) -> Tensor:
    """The tensor with stride - 1 zeros between neighbours along its last axes."""
    if all(step == 1 for step in stride):
        return x
    size = [(n - 1) * step + 1 for n, step in zip(x.shape[2:], stride, strict=True)]
    result = x.new_zeros(*x.shape[:2], *size)
    index: Any = (..., *(slice(None, None, step) for step in stride))
    result[index] = x
    return result


def grouped(patches: Tensor, groups: int) -> Tensor:
    """The windows (N, *places, channels, *kernel) as (N, places, groups, in)."""
    spatial = (patches.ndim - 2) // 2
    lead = patches.shape[: 1 + spatial]
    return patches.reshape(lead[0], lead[1:].numel(), groups, -1)

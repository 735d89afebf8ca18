"""Random signs that are the same on every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def generator(seed: int, number: int) -> torch.Generator:
    """The generator of one of several draws, on the CPU so that every device has the same."""
    return torch.Generator(device="cpu").manual_seed((1_000_003 * seed + number) % 2**63)


def signs(shape: Sequence[int], source: torch.Generator, like: Tensor) -> Tensor:
    """Independent signs ±1, in the precision and on the device of a tensor."""
    drawn = torch.randint(0, 2, tuple(shape), generator=source, dtype=torch.int8, device="cpu")
    return (2 * drawn - 1).to(like.device, like.dtype)

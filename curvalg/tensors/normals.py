"""Normal numbers from a seed, drawn on the CPU in double precision: a seed means the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def normals(shape: torch.Size | tuple[int, ...], seed: int) -> Tensor:
    """Independent standard normal numbers, float64 on the CPU; no generator of the user's is advanced."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

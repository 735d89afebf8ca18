"""Random numbers that mean the same on every device, and advance no generator of the user's.

Uniform ones depend only on (seed, draw, running number of the sample, element), by a counter-based hash: batch splits, repeated
products and devices agree on every Monte-Carlo draw. Normal ones are drawn on the CPU in double precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """A 64-bit constant as torch's int64 holds it."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


# Constants of the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift(x: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically: mask the copies of the sign bit.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def uniforms(
    seed: int, draws: int, start: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Uniform numbers in the open interval (0, 1).

    Args:
        seed: of the stream.
        draws: number of draws per sample.
        start: running number of the first sample.
        shape: (samples, elements per sample...).

    Returns:
        shape (draws, *shape).
    """
    samples, elements = shape[0], 1
    for n in shape[1:]:
        elements *= n
    draw = torch.arange(draws, device=device)
    sample = torch.arange(start, start + samples, device=device)
    element = torch.arange(elements, device=device)
    key = _mix(torch.tensor(_signed(seed + 1), dtype=torch.int64, device=device) * _GOLDEN)
    key = _mix(key + (draw + 1) * _GOLDEN)[:, None]
    key = _mix(key + (sample + 1) * _GOLDEN)[:, :, None]
    bits = _mix(key + (element + 1) * _GOLDEN)
    # The half keeps both ends open; 52 (23) leading bits and the half are exact in float64 (float32).
    kept = 52 if dtype == torch.float64 else 23
    numbers = (_shift(bits, 64 - kept).to(dtype) + 0.5) * 2.0**-kept
    return numbers.reshape(draws, *shape)


def normals(shape: torch.Size | tuple[int, ...], seed: int) -> Tensor:
    """Independent standard normal numbers from a seed, float64 on the CPU."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

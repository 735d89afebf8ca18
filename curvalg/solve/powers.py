"""Powers of two as units: numbers are brought near one, and back, without a rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from curvalg.tensors.spaces import VectorSpace
from curvalg.tensors.spaces.vector_space import space_of


def exponents(columns: Tensor, space: VectorSpace | None = None) -> Tensor:
    """The exponents e (K,) with 2^e ≤ max |entry| < 2^(e + 1) of each column (n, K); 0 for zero and non-finite columns.

    Args:
        columns: vectors.
        space: that they are in; they are whole by default.
    """
    largest = space_of(columns, space, 0).peaks(columns)
    exponent = torch.frexp(largest).exponent - 1
    return torch.where((largest > 0) & torch.isfinite(largest), exponent, 0)


def scaled(x: Tensor, exponent: Tensor) -> Tensor:
    """The product 2^e x along the last axis, in two steps, as 2^e itself may be out of range where the product is not."""
    half = exponent // 2
    one = torch.ones_like(half, dtype=x.dtype)
    return x * torch.ldexp(one, half) * torch.ldexp(one, exponent - half)


def norms(columns: Tensor, space: VectorSpace | None = None) -> Tensor:
    """The norms ‖column‖ (K,), also where squares would overflow or vanish; arguments as of :func:`exponents`."""
    space = space_of(columns, space, 0)
    unit = exponents(columns, space)
    return scaled(space.norms(scaled(columns, -unit)), unit)

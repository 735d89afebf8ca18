"""Symmetric matrices of known spectra."""

from __future__ import annotations

import torch
from torch import Tensor

F64 = torch.float64

SPECTRA: dict[str, Tensor] = {
    "decaying": torch.logspace(0, -6, 120, dtype=F64),
    "repeated": torch.cat([torch.full((5,), 5.0, dtype=F64), torch.linspace(-2, 4, 95, dtype=F64)]),
    "clustered": torch.cat([1 + 1e-6 * torch.arange(6, dtype=F64), torch.linspace(-0.5, 0.9, 114, dtype=F64)]),
    "low rank": torch.cat([torch.tensor([3.0, 2.0, -1.0], dtype=F64), torch.zeros(77, dtype=F64)]),
    "indefinite": torch.linspace(-1, 1, 90, dtype=F64) ** 3,
    "identity": torch.ones(60, dtype=F64),
    "zero": torch.zeros(40, dtype=F64),
    "two distinct": torch.cat([torch.ones(30, dtype=F64), -torch.ones(30, dtype=F64)]),
    "1 x 1": torch.tensor([2.0], dtype=F64),
    "2 x 2": torch.tensor([2.0, -1.0], dtype=F64),
}


def matrix(spectrum: Tensor, dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    """With the spectrum, in a random basis."""
    n = len(spectrum)
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=F64)).Q
    A = Q @ torch.diag(spectrum) @ Q.T
    return ((A + A.T) / 2).to(dtype)


def expected(spectrum: Tensor, which: str, k: int) -> Tensor:
    """The wanted ones, ascending; of magnitudes for "LM", where signs of ties are anybody's."""
    low = spectrum.sort().values
    if which == "LM":
        return low.abs().sort().values[-k:]
    if which == "BE":
        return torch.cat([low[: k // 2], low[len(low) - (k - k // 2) :]])
    return low[-k:] if which == "LA" else low[:k]

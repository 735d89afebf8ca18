"""Integrands to be averaged over random vectors: functions of a vector and its image under the operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from curvalg.solve.orthogonal import small
from curvalg.tensors.long_vectors import dot
from curvalg.tensors.memory import wide, widest


@dataclass(frozen=True)
class Integrand:
    """A quadratic form: its mean over test vectors ω, E ω ωᵀ = I, is its sum over any orthonormal basis.

    Args:
        at: of one vector (n,) and its image, in float64.
        distribution: of the test vectors that suit it, as of :class:`~curvalg.estimate.sampling.probes.Probes`.
        entrywise: whether it is a vector (n,), which is on the operator's device, rather than a number, which is on the CPU.
    """

    at: Callable[[Tensor, Tensor], Tensor]
    distribution: Literal["sphere", "signs"] = "sphere"
    entrywise: bool = False

    def samples(self, rows: Tensor, images: Tensor) -> Tensor:
        """One number for each row, (m,)."""
        found = [self.at(x, y) for x, y in zip(rows, images, strict=True)]
        return small(torch.stack(found)) if found else torch.zeros(0, dtype=torch.float64, device="cpu")

    def total(self, rows: Tensor, images: Tensor) -> Tensor:
        """The sum over rows; that over a whole orthonormal basis is exact."""
        if not self.entrywise:
            return self.samples(rows, images).sum()
        total = torch.zeros(rows.shape[1], dtype=widest(rows.device), device=rows.device)
        for x, y in zip(rows, images, strict=True):
            total += self.at(x, y)
        return total


TRACE = Integrand(dot)
"""ωᵀAω, of mean tr A. On the sphere rather than with signs or Gaussians: multiples of the identity then have no error in any
basis."""
SQUARED_NORM = Integrand(lambda x, y: dot(y, y))
"""‖Aω‖², of mean tr AᵀA = ‖A‖²_F, without products with Aᵀ; operators may be rectangular."""
DIAGONAL = Integrand(lambda x, y: wide(x) * wide(y), "signs", True)
"""ω ⊙ Aω, of mean diag A."""

"""Integrands to be averaged over random vectors: functions of a vector and its image under the operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from curvalg.estimate.target import Target
from curvalg.tensors.memory import small, wide, widest


@dataclass(frozen=True)
class Integrand:
    """A quadratic form: its mean over test vectors ω, E ω ωᵀ = I, is its sum over any orthonormal basis.

    Args:
        at: of an operator, one vector (n,) and its image, in float64: what the numbers held by this process add to it.
        distribution: of the test vectors that suit it, as of :class:`~curvalg.estimate.sampling.probes.Probes`.
        entrywise: whether it is a vector (n,), which is on the operator's device, rather than a number, which is on the CPU.
        of_images: whether it is summed over the numbers of the image, which are others where the operator is rectangular.
    """

    at: Callable[[Target, Tensor, Tensor], Tensor]
    distribution: Literal["sphere", "signs"] = "sphere"
    entrywise: bool = False
    of_images: bool = False

    def samples(self, target: Target, rows: Tensor, images: Tensor) -> Tensor:
        """One number for each row, (m,)."""
        found = [self.at(target, x, y) for x, y in zip(rows, images, strict=True)]
        if not found:
            return torch.zeros(0, dtype=torch.float64, device="cpu")
        space = target.images if self.of_images else target.vectors
        return small(space.total(torch.stack(found)))

    def total(self, target: Target, rows: Tensor, images: Tensor) -> Tensor:
        """The sum over rows; that over a whole orthonormal basis is exact."""
        if not self.entrywise:
            return self.samples(target, rows, images).sum()
        total = torch.zeros(rows.shape[1], dtype=widest(rows.device), device=rows.device)
        for x, y in zip(rows, images, strict=True):
            total += self.at(target, x, y)
        return total

    def size(self, target: Target, value: Tensor) -> Tensor:
        """The magnitude of a value or an error, the norm over all processes where it is a vector."""
        return target.vectors.norms(value[None], 1)[0] if self.entrywise else value.norm()


TRACE = Integrand(lambda target, x, y: target.vectors.dot_part(x, y))
"""ωᵀAω, of mean tr A. On the sphere rather than with signs or Gaussians: multiples of the identity then have no error in any
basis."""
SQUARED_NORM = Integrand(lambda target, x, y: target.images.dot_part(y, y), of_images=True)
"""‖Aω‖², of mean tr AᵀA = ‖A‖²_F, without products with Aᵀ; operators may be rectangular."""
DIAGONAL = Integrand(lambda target, x, y: wide(x) * wide(y), "signs", True)
"""ω ⊙ Aω, of mean diag A."""

"""Traces by independent samples."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from curvalg.estimate.sampling.probes import pairwise
from curvalg.estimate.sampling.sampler import Sketch, Tensors, standard_error
from curvalg.runs.run_state import Form


class Hutchinson(Sketch):
    """tr A = E ωᵀAω (Girard, 1987; Hutchinson, 1990); best for flat spectra.

    On the sphere rather than with signs or Gaussians: multiples of the identity then have no error in any basis.
    """

    method: ClassVar[str] = "hutchinson"
    keeps: ClassVar[bool] = False

    def form(self, columns: int) -> Form:
        """The samples."""
        return {"samples": (torch.float64, (columns,))}

    def extended(self, sketch: Tensors, start: int, stop: int) -> tuple[Tensors, int]:
        """More samples; the vectors are forgotten."""
        omega = self.probes.rows(start, stop)
        samples = self.sample(omega, self._multiply(omega))
        return {"samples": torch.cat([sketch["samples"], samples])}, stop - start

    def sample(self, omega: Tensor, images: Tensor) -> Tensor:
        """One number for each vector."""
        return pairwise(omega, images)

    def estimate(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """Their mean; of a multiple of the identity they differ by less than rounding does to all of them."""
        samples = sketch["samples"]
        noise = torch.finfo(self.target.space.dtype).eps * samples.abs().mean()
        return samples.mean(), torch.hypot(standard_error(samples), noise)

    def _columns(self, budget: int) -> int:
        return budget // self.price


class SquaredNorms(Hutchinson):
    """‖A‖²_F = tr AᵀA = E ‖Aω‖², without products with Aᵀ; operators may be rectangular."""

    def sample(self, omega: Tensor, images: Tensor) -> Tensor:
        """‖Aω‖²."""
        return pairwise(images, images)

    def contribution(self, rows: Tensor, images: Tensor) -> Tensor:
        """Squared norms."""
        return pairwise(images, images).sum()

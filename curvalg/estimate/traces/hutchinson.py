"""Estimators by means of independent samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from curvalg.estimate.sampling.error_bar import standard_error
from curvalg.estimate.sampling.estimator import Estimator, Tensors
from curvalg.runs.run_state import Form
from curvalg.tensors.memory import widest


class SampleMean(Estimator):
    """The mean of any number of samples (Girard, 1987; Hutchinson, 1990); best for flat spectra."""

    method: ClassVar[str] = "hutchinson"
    keeps: ClassVar[bool] = False

    def form(self, columns: int) -> Form:
        """The samples so far."""
        return {"samples": (torch.float64, (columns,))}

    def extended(self, sketch: Tensors, start: int, stop: int) -> tuple[Tensors, int]:
        """The sketch with more samples; the vectors are forgotten."""
        omega = self.probes.rows(start, stop)
        samples = self.integrand.samples(self.target, omega, self.multiply(omega))
        return {"samples": torch.cat([sketch["samples"], samples])}, stop - start

    def estimate(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """The mean of the samples; of a multiple of the identity they differ by less than rounding does to all of them."""
        samples = sketch["samples"]
        noise = torch.finfo(self.target.space.dtype).eps * samples.abs().mean()
        return samples.mean(), torch.hypot(standard_error(samples), noise)

    @classmethod
    def columns(cls, multiplications: int, size: int) -> int:
        """One for each multiplication, as no vector is held."""
        return multiplications


class RunningMean(SampleMean):
    """The mean of vectors, of which only mean and squared deviations are kept (Bekas, Kokiopoulou and Saad, 2007).

    Of a diagonal by signs, the error of entry i is that of the rest of row i.
    """

    axes: ClassVar[Mapping[str, int]] = {"mean": 0, "squares": 0}

    def form(self, columns: int) -> Form:
        """The mean and the squared deviations."""
        entries = widest(self.target.space.device), (self.target.local,)
        return {"mean": entries, "squares": entries}

    def extended(self, sketch: Tensors, start: int, stop: int) -> tuple[Tensors, int]:
        """The mean and deviations, updated as samples come (Welford, 1962)."""
        omega = self.probes.rows(start, stop)
        mean, squares = sketch["mean"], sketch["squares"]
        for count, (x, y) in enumerate(zip(omega, self.multiply(omega), strict=True), start + 1):
            sample = self.integrand.at(self.target, x, y)
            old, mean = mean, mean + (sample - mean) / count
            squares = squares + (sample - old) * (sample - mean)
        return {"mean": mean, "squares": squares}, stop - start

    def estimate(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """The mean, with its standard error entry by entry."""
        return sketch["mean"].clone(), (sketch["squares"] / max(0, columns - 1) / columns).sqrt()

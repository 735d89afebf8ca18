"""Eigenvalues, densities and traces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.cases.base import PeersCase
from benchmarks.effort import Effort
from benchmarks.results import Task


class Spectra(PeersCase):
    """From nothing known to the answer, each library by its own estimator."""

    name = "spectra"
    says = "the largest eigenvalues and the spectral density of the Hessian, traces of the GGN and the Hessian"
    models = ("MLP",)

    def tasks(self, models: Sequence[str], effort: Effort) -> Iterator[Task]:
        for model in models:
            for question in ("eigenvalues", "density", "trace ggn", "trace hessian"):
                yield Task(self.name, question, model)

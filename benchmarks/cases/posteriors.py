"""What a Laplace approximation answers, with its curvature at hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.cases.base import PeersCase
from benchmarks.effort import Effort
from benchmarks.results import Task


class Posteriors(PeersCase):
    """KFAC of the GGN and a prior of precision 1, made before."""

    name = "posteriors"
    says = "covariances of the outputs of single rows, and draws of the parameters, with KFAC at hand"
    models = ("MLP 13k",)
    always = models

    def tasks(self, models: Sequence[str], effort: Effort) -> Iterator[Task]:
        for model in models:
            for question in ("functional variance", "posterior draws"):
                yield Task(self.name, question, model)

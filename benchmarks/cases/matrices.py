"""Explicit matrices, built and multiplied once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.cases.base import PeersCase
from benchmarks.effort import Effort
from benchmarks.results import Task


class Matrices(PeersCase):
    """Monte-Carlo variants are left out: their values differ by the draws."""

    name = "matrices"
    says = "KFAC, EKFAC and the diagonal of the GGN, built and multiplied once"
    models = ("MLP", "CNN")

    def tasks(self, models: Sequence[str], effort: Effort) -> Iterator[Task]:
        for model in models:
            for question in ("kfac exact", "kfac empirical", "ekfac exact", "ekfac empirical", "ggn diagonal"):
                yield Task(self.name, question, model)

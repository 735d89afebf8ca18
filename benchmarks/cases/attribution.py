"""Influence of training samples, with the factors of EKFAC at hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.cases.base import PeersCase
from benchmarks.effort import Effort
from benchmarks.results import Task


class Attribution(PeersCase):
    """The first rows of the data ask all rows; factors are those of the covariance, which has no draws."""

    name = "attribution"
    says = "influence scores of all samples for some, and of all for themselves, with the factors of EKFAC at hand"
    models = ("MLP",)

    def tasks(self, models: Sequence[str], effort: Effort) -> Iterator[Task]:
        for model in models:
            for question in ("influence scores", "self influence"):
                yield Task(self.name, question, model)

"""Products with one vector, on the whole data as one batch and as several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.cases.base import PeersCase
from benchmarks.effort import Effort
from benchmarks.questions import PRODUCTS
from benchmarks.results import Task


class Products(PeersCase):
    """Once recorded, where a library records."""

    name = "products"
    says = "products of the Hessian, the GGN, the covariance and their sum with one vector"

    def tasks(self, models: Sequence[str], effort: Effort) -> Iterator[Task]:
        for batches in effort.splits:
            for model in models:
                for question in PRODUCTS:
                    yield Task(self.name, question, model, 1, batches)

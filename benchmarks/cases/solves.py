"""Damped inverses of the GGN."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.cases.base import PeersCase
from benchmarks.effort import Effort
from benchmarks.results import Task

QUESTIONS = (
    "solve gram",
    "solve gram again",
    "solve gram other damping",
    "solve cg",
    "solve cg kfac",
    "solve cg nystrom",
)


class Solves(PeersCase):
    """Through the Gram matrix, and by conjugate gradients with and without a preconditioner."""

    name = "solves"
    says = "damped inverses of the GGN through its Gram matrix and by conjugate gradients"
    models = ("MLP",)

    def tasks(self, models: Sequence[str], effort: Effort) -> Iterator[Task]:
        for model in models:
            for question in QUESTIONS:
                yield Task(self.name, question, model)

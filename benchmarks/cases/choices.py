"""What curvalg chose by measuring, against every way that it could have taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.cases.base import WaysCase
from benchmarks.effort import Effort
from benchmarks.peers.base import Run
from benchmarks.peers.curvalg import matrix
from benchmarks.results import Record, Task
from benchmarks.workload import Workload
from curvalg import Problem

CHOSEN = "auto"


def ways_of(columns: int) -> dict[str, dict[str, Any]]:
    """Options of :class:`curvalg.Problem` that force a way, by label, what it chooses by itself first.

    An option that the installed version does not know is skipped with its own message, so that a new way is one row here
    whatever version is measured.
    """
    factored: dict[str, dict[str, Any]] = {CHOSEN: {}, "factored": {"factored": True}}
    recorded = {
        "kept": {"columns": "loop", "factored": False},
        "fresh": {"columns": "loop", "factored": False, "cache": 0},
    }
    if columns == 1:
        return factored | recorded
    many = dict(factored)
    for label, options in recorded.items():
        many[f"{label}, loop"] = options
        for chunk in dict.fromkeys((max(2, columns // 4), columns)):
            many[f"{label}, chunks of {chunk}"] = {**options, "columns": chunk}
    return many


def regret(record: Record) -> float | None:
    """Time of the chosen way over that of the best one that was forced; None where one is missing."""
    chosen = record.median(CHOSEN)
    forced = [record.median(label) for label in record.values if label not in (CHOSEN, "gradient")]
    best = min((median for median in forced if median is not None), default=None)
    return chosen / best if chosen is not None and best else None


class Choices(WaysCase):
    """Near 1 everywhere if the choices are good."""

    name = "choices"
    says = "every way a product could take against the one that was chosen"

    def tasks(self, models: Sequence[str], effort: Effort) -> Iterator[Task]:
        for columns, questions in zip((1, *effort.columns[:1]), effort.choices):
            for model in models:
                for question in questions:
                    yield Task(self.name, question, model, columns)

    def ways(self, task: Task) -> Mapping[str, Callable[[Workload], Run]]:
        def way(options: dict[str, Any]) -> Callable[[Workload], Run]:
            def prepare(workload: Workload) -> Run:
                op = matrix(task.question).lower(Problem(workload.model, workload.loss, workload.data, **options))
                return lambda: op @ workload.vectors

            return prepare

        return {label: way(options) for label, options in ways_of(task.columns).items()}

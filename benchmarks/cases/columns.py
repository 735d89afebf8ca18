"""Products with several columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks.cases.base import PeersCase
from benchmarks.effort import Effort
from benchmarks.questions import PRODUCTS
from benchmarks.results import Record, Task
from benchmarks.timing import Entrant
from benchmarks.workload import Workload

if TYPE_CHECKING:
    from benchmarks.session import Session


class Columns(PeersCase):
    """Without what costs K single products, or a sum of single terms, by construction: that is known without timing it."""

    name = "columns"
    says = "the same products with K columns"

    def tasks(self, models: Sequence[str], effort: Effort) -> Iterator[Task]:
        for batches in effort.columns_splits:
            for columns in effort.columns:
                for model in models:
                    for question in PRODUCTS:
                        yield Task(self.name, question, model, columns, batches)

    def entrants(self, task: Task, workload: Workload, session: Session, record: Record) -> dict[str, Entrant]:
        able = [p for p in session.peers if p.many_columns and (p.fuses or task.question != "sum")]
        return super().entrants(task, workload, replace(session, peers=able), record)

"""Block-diagonal products against full ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from benchmarks.cases.base import WaysCase
from benchmarks.effort import Effort
from benchmarks.peers.base import Run
from benchmarks.peers.curvalg import Curvalg, matrix
from benchmarks.questions import TERMS
from benchmarks.results import Task
from benchmarks.workload import Workload
from curvalg import Expr, block_diagonal


class Blocks(WaysCase):
    """What peers take a product for each block for. They are other matrices than the full one: nothing to compare."""

    name = "blocks"
    says = "products of block-diagonals by module and by parameter, against the full product"
    models = ("MLP", "CNN")
    tolerance = float("inf")

    def tasks(self, models: Sequence[str], effort: Effort) -> Iterator[Task]:
        for model in models:
            for question in TERMS:
                yield Task(self.name, question, model)

    def ways(self, task: Task) -> Mapping[str, Callable[[Workload], Run]]:
        full = matrix(task.question)
        exprs: dict[str, Expr] = {"full": full}
        exprs |= {f"by {by}": block_diagonal(full, by=by) for by in ("module", "parameter")}

        def way(expr: Expr) -> Callable[[Workload], Run]:
            def prepare(workload: Workload) -> Run:
                op = expr.lower(Curvalg().problem(workload))
                return lambda: op @ workload.vectors

            return prepare

        return {label: way(expr) for label, expr in exprs.items()}

"""Numbers of rows in output space, batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

from curvalg.errors import ProblemError
from curvalg.problem import Problem, Snapshot


@dataclass(frozen=True)
class OutputSizes:
    """Where outputs lie among the rows of output space.

    Args:
        here: the outputs of every batch of this process.
        before: those of the processes before it.
        total: those of all.
    """

    here: tuple[int, ...]
    before: int
    total: int

    @property
    def places(self) -> slice:
        """The rows of this process."""
        return slice(self.before, self.before + sum(self.here))


def output_sizes(problem: Problem, snapshot: Snapshot) -> OutputSizes:
    """The number of outputs of every batch, by one pass of the model; kept.

    Raises:
        ProblemError: the data come in random order, so that rows of output space have no meaning.
    """
    if not problem.data.ordered:
        raise ProblemError(
            "outputs are rows in the order of the data, but the loader shuffles; pass shuffle=False, or list(loader)"
        )

    def count() -> OutputSizes:
        with problem.differentiating(), problem.together("counting outputs"):
            here = tuple(e.output()[0].numel() for e in problem.evaluations(snapshot, order_matters=True))
            every = [int(number) for (number,) in problem.group.numbers(sum(here))]
            return OutputSizes(here, sum(every[: problem.group.rank]), sum(every))

    return problem.cached(snapshot).get("output sizes", None, count)

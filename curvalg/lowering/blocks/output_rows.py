"""Numbers of rows in output space, batch by batch."""

from __future__ import annotations

from curvalg.errors import ProblemError
from curvalg.problem import Problem, Snapshot


def output_sizes(problem: Problem, snapshot: Snapshot) -> list[int]:
    """The number of outputs of every batch, by one pass of the model; kept.

    Raises:
        ProblemError: the data come in random order, so that rows of output space have no meaning.
    """
    if not problem.data.ordered:
        raise ProblemError(
            "outputs are rows in the order of the data, but the loader shuffles; pass shuffle=False, or list(loader)"
        )

    def count() -> list[int]:
        with problem.differentiating():
            return [e.output()[0].numel() for e in problem.evaluations(snapshot, order_matters=True)]

    return problem.cached(snapshot).get("output sizes", None, count)

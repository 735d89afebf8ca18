"""Terms give the matrix of one process where several share the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from curvalg.distributed.pool import NotSent, pool
from curvalg.errors import LossError, ProblemError
from curvalg.expr import Expr
from curvalg.problem import Problem
from curvalg.testing.outcome import Failure, NotApplicable, require_close
from curvalg.testing.place import place
from curvalg.testing.subject import COLUMNS, Case, on_problems
from curvalg.testing.variants import among

CURE = (
    "Statistics are added over the batches of all processes: keep nothing on the term, its class or its module that a batch "
    "left there, and let settle() and finish() work on a process that has seen no batch"
)


@dataclass(frozen=True)
class Raised:
    """What was raised on a process.

    Args:
        what: class and message, and where the code of a term's author led to it.
        refusal: whether it is how a term refuses a loss or problem.
    """

    what: str
    refusal: bool


@on_problems
def processes(case: Case) -> None:
    """Two processes that share the data give the matrix of one, with uneven parts and with no data on one of them."""
    samples = case.problem.data.read(case.problem.device, order_matters=True)
    batches = [sample.batch for sample in samples]
    twin = case.problem.with_data(batches)
    sides = [(case.term, case.matrix)]
    if case.transpose is not None and case.transpose is not case.matrix:
        sides.append((case.term.T, case.transpose))
    for cut in sorted({0, len(batches) // 2, len(batches)}):  # at first none: no batch has left anything there yet
        parts = f"{_batches(cut)} on one of two processes and {_batches(len(batches) - cut)} on the other"
        for term, expected in sides:
            for found in _matrices(term, twin, cut, parts):
                require_close(found, expected, what=f"the matrix of one process from {parts}", cure=CURE)


def _batches(count: int) -> str:
    return "no batch" if not count else f"{count} batch{'es' if count > 1 else ''}"


def _matrices(term: Expr, problem: Problem, cut: int, parts: str) -> list[Tensor]:
    """The dense matrix as each of the processes finds it."""
    try:
        found = pool().run(_matrix, term, problem, cut)
    except NotSent as reason:
        raise NotApplicable(str(reason)) from reason
    raised = {rank: one for rank, one in enumerate(found) if isinstance(one, Raised)}
    if len(raised) == len(found) and all(one.refusal for one in raised.values()):
        raise NotApplicable(f"the term refuses data that two processes share ({raised[0].what})")
    if raised:
        pool().close()  # who knows what they wait for
        shown = "; ".join(f"on process {rank}, {one.what}" for rank, one in raised.items())
        raise Failure(f"a matrix from {parts}", shown, CURE)
    return found


def _matrix(group: Any, term: Expr, problem: Problem, cut: int) -> Tensor | Raised:
    """The dense matrix as a process finds it that has the batches before the cut, or those from it on."""
    try:
        shared = among(problem, group, cut)
        shared.columns = COLUMNS
        with shared.group.together(f"the matrix of {term}"):
            matrix = term.lower(shared).to_dense().cpu()
            shared.group.every(True)  # where the other is told of an error, should this one need it no more
        return matrix
    except Exception as error:
        return Raised(f"{type(error).__name__}: {error}{place(error)}", isinstance(error, (LossError, ProblemError)))

"""Statistics of layers where parameters lie in parts: recorded in step, summed and settled by the owners of the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from torch import Tensor

from curvalg.distributed.group import Group, activated
from curvalg.errors import ProblemError
from curvalg.expr.term import MatrixTerm
from curvalg.lowering.blocks.owned_matrix import ownership
from curvalg.problem import Batch, Problem, Snapshot
from curvalg.problem.layers.recorded_together import compare_together, record_together
from curvalg.tensors import trees

Method = Callable[[MatrixTerm, Batch], Any]


def summed_by_owners(
    terms: Sequence[MatrixTerm], problem: Problem, snapshot: Snapshot, method: Method
) -> dict[MatrixTerm, Any]:
    """The sums over all data of what terms make of each batch, of the layers of this process.

    Args:
        terms: of one pass over the data.
        problem: whose parameters lie in parts.
        snapshot: the state.
        method: gives the statistics of a term of a batch.

    Raises:
        ProblemError: a layer of which parameters belong to several modules.
    """
    if not terms:
        return {}
    sums = {term: problem.sum() for term in terms}
    with problem.differentiating():
        for evaluation in problem.evaluations(snapshot):
            recorded = record_together(evaluation)
            compare_together(recorded)
            for term in terms:
                sums[term].add(recorded.batch.counted(method(term, recorded.batch)))
                recorded.finish()
    wide = [total.wide for total in sums.values()]
    names = [frozenset(some) for some in ownership(problem, snapshot).layers.names]
    parts = [[term.of_layers(stats, some) for term, stats in zip(terms, wide, strict=True)] for some in names]
    for term, stats, *each in zip(terms, wide, *parts, strict=True):
        _require_all(term, stats, each)
    came = problem.group.handed_out(parts)
    totals = [reduce(trees.add, each) for each in zip(*came, strict=True)]
    return dict(zip(terms, trees.tensor_map(lambda t: _rounded(t, problem), totals), strict=True))


def _rounded(t: Tensor, problem: Problem) -> Tensor:
    """A sum in the dtype of vectors, where sums are taken in a wider one."""
    return t if problem.accumulate is None or not t.is_floating_point() else t.to(problem.dtype)


def _require_all(term: MatrixTerm, stats: Any, parts: Sequence[Any]) -> None:
    """Raise where a layer is in no part, since its parameters belong to several owners.

    Raises:
        ProblemError: there is one.
    """
    if sum(len(trees.tensors(part)) for part in parts) != len(trees.tensors(stats)):
        raise ProblemError(
            f"{term.label}: some layer reads parameters of several modules, which may lie with several processes where "
            "parameters are sharded; give a weight and its bias to one module, or make the Problem of a whole model on every "
            "process"
        )


def settled_by_owners(term: MatrixTerm, stats: Any, problem: Problem) -> tuple[Any, Any]:
    """What a term settles of the sums of its first pass: of the layers of this process, and of all.

    Each process settles its own layers, alone; all of them need the result in the second pass over their data.
    """
    with activated(Group()):
        own = term.settle(stats)
    every = [problem.group.of(rank, own) for rank in range(problem.group.size)]
    return own, reduce(trees.add, every)

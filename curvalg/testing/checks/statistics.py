"""Statistics of the whole data set are added over batches, and matrices made of them are made once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from curvalg.expr import Expr, Identity, NamedExpr
from curvalg.expr.term import DatasetTerm, MatrixTerm
from curvalg.problem import Batch, Problem
from curvalg.tensors import trees
from curvalg.testing.outcome import Failure, NotApplicable, require_close
from curvalg.testing.subject import Case, on_problems
from curvalg.testing.variants import batches, counted, rebatched


def _summed(problem: Problem, method: Callable[[Batch], Any]) -> Any:
    total: Any = None
    with batches(problem) as found:
        for batch in found:
            total = trees.add(total, method(batch))
    return total


@on_problems
def additivity(case: Case) -> None:
    """Statistics of prepare() and accumulate() add up: batch by batch they give the same as on all data at once."""
    term = case.term
    if not isinstance(term, (DatasetTerm, MatrixTerm)):
        raise NotApplicable("the term has no statistics")
    whole, split = (rebatched(case.problem, sizes) for sizes in ([case.problem.totals.rows], [1, 2]))
    prepared = _same_sum("prepare", whole, split, term.prepare)
    if isinstance(term, MatrixTerm):
        settled = term.settle(prepared)
        _same_sum("accumulate", whole, split, lambda batch: term.accumulate(batch, settled))


def _same_sum(method: str, whole: Problem, split: Problem, function: Callable[[Batch], Any]) -> Any:
    cure = (
        f"Return from {method} sums over the batch's samples in a tensor or a tree of tensors whose shapes do not depend on "
        "the batch; means, roots and products of sums belong into finish() or cotangent_dot()"
    )
    try:
        at_once, added = _summed(whole, function), _summed(split, function)
    except (ValueError, RuntimeError) as error:  # trees that differ, or shapes that do not add
        raise Failure(f"statistics of {method} that can be added", f"{type(error).__name__}: {error}", cure) from error
    leaves = list(zip(trees.leaves(added), trees.leaves(at_once), strict=True))
    if not all(isinstance(leaf, Tensor) for pair in leaves for leaf in pair):
        raise Failure(f"tensors from {method}", f"{trees.describe(at_once)}", cure)
    for a, b in leaves:
        require_close(a, b, what=f"{method} over batches to add up to {method} over all data", cure=cure)
    return at_once


@on_problems
def finish(case: Case) -> None:
    """The result of finish() is an expression of array leaves over the layout, made once; equal terms reuse it."""
    term = case.term
    if not isinstance(term, MatrixTerm):
        raise NotApplicable("the term is no MatrixTerm")
    problem, calls = counted(case.problem)
    prepared = term.settle(_summed(problem, term.prepare))
    stats = _summed(problem, partial(term.accumulate, prepared=prepared))
    while (further := term.repeat(stats, prepared)) is not None:
        prepared = further
        stats = _summed(problem, partial(term.accumulate, prepared=prepared))
    made = [term.finish(stats, problem.layout, prepared) for _ in range(2)]
    for expr in made:
        _array_leaves(expr)
        require_close(
            case.dense(expr),
            case.matrix,
            what="finish() to give the matrix of the products, also when called again",
            cure="finish() must not write into the statistics, nor keep a state",
        )
    v = case.vectors(1)[:, 0]
    _ = term.lower(problem) @ v
    before = calls()
    _ = (copy.deepcopy(term) + Identity).lower(problem) @ v
    if calls() != before:
        raise Failure(
            "the matrix to be made once and reused in other expressions",
            f"{calls() - before} more model calls",
            "Equal terms must compare equal and hash alike: leave __eq__ and __hash__ to @dataclass(frozen=True)",
        )


def _array_leaves(expr: Any) -> None:
    if not isinstance(expr, Expr):
        raise Failure(
            "an expression from finish()", type(expr).__name__, "Wrap arrays in Diagonal, Kronecker, LowRank, …"
        )
    for node in expr.walk():
        if isinstance(node, NamedExpr):
            raise Failure(
                "array leaves from finish()", f"the term {node}", "Return what the statistics hold as array leaves"
            )

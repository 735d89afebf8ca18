"""Fingerprints of what a run is about, so that a checkpoint is resumed with nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from curvalg.estimate.checkpoint import digest
from curvalg.estimate.state import Options
from curvalg.expr.leaves import ArrayLeaf
from curvalg.expr.node import Expr
from curvalg.lowering import CurvatureOperator
from curvalg.problem import Problem, trees


def of_operator(op: CurvatureOperator) -> Options:
    """Name -> what JSON can hold; names are words for messages."""
    return {"expression": str(op.expr), "arrays of the expression": _arrays(op.expr), **_of_problem(op)}


def _arrays(expr: Expr) -> list[str]:
    # Contents rather than tokens: those are new in every process.
    return [digest(*(torch.as_tensor(a) for a in leaf.arrays)) for leaf in _leaves(expr)]


def _leaves(expr: Expr) -> Iterator[ArrayLeaf]:
    if isinstance(expr, ArrayLeaf):
        yield expr
    for child in expr.children:
        yield from _leaves(child)


def _of_problem(op: CurvatureOperator) -> Options:
    problem = op.problem
    names = sorted(op.snapshot.state)
    return {
        "chosen parameters": [f"{name} {tuple(shape)}" for name, shape in problem.layout.shapes.items()],
        "values of parameters and buffers": digest(*(op.snapshot.state[name] for name in names)),
        "precision": str(problem.dtype),
        "precision of sums over batches": str(problem.accumulate),
        "precision that the model is cast to": str(problem.autocast),
        "loss": str(problem.loss.name) if problem.loss is not None else None,
        "number of samples": problem.num_samples,
        "rows of the data": problem.totals.rows,
        "what a sample is": problem.samples,
        "contents of the data": _data(problem),
    }


def _data(problem: Problem) -> str | None:
    """Of data that lie in memory; those of a loader are known by their numbers only."""
    return digest(*trees.tensors(problem.data.source)) if problem.data.fixed else None

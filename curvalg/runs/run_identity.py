"""Fingerprints of what a run is about, so that a checkpoint is resumed with nothing else."""

from __future__ import annotations

import torch

from curvalg.expr.node import Expr
from curvalg.expr.nodes.arrays import ArrayLeaf
from curvalg.expr.term import needs_model
from curvalg.problem import Problem, Snapshot
from curvalg.problem.data.row_hashes import TOLERANCE, Fingerprint, total
from curvalg.runs.model_numbers import numbers
from curvalg.runs.run_state import Options
from curvalg.runs.sealed import digest
from curvalg.runs.vector_digest import state_digest
from curvalg.tensors import trees


def run_identity(expr: Expr, problem: Problem, snapshot: Snapshot, rounding: float) -> Options:
    """The fingerprint of a run: name -> what JSON can hold; names are words for messages.

    Args:
        expr: that the run multiplies by.
        problem, snapshot: that it is of, and where.
        rounding: relative error of products of a model in half precision; 0 for others.
    """
    return {
        "expression": str(expr),
        "arrays of the expression": _arrays(expr),
        **state_identity(problem, snapshot),
        **(_numbers(problem, snapshot, rounding) if needs_model(expr) else {}),
    }


def state_identity(problem: Problem, snapshot: Snapshot) -> Options:
    """The fingerprint of a problem at a state, without calls of its model: name -> what JSON can hold."""
    return {
        "chosen parameters": [f"{name} {tuple(shape)}" for name, shape in problem.layout.whole.shapes.items()],
        "values of parameters and buffers": state_digest(problem, snapshot),
        "precision": str(problem.dtype),
        "precision of sums over batches": str(problem.accumulate),
        "precision that the model is cast to": str(problem.autocast),
        "loss": str(problem.loss.name) if problem.loss is not None else None,
        "number of samples": problem.num_samples,
        "rows of the data": problem.totals.rows,
        "what a sample is": problem.samples,
        "contents of the data": _data(problem),
    }


def _arrays(expr: Expr) -> list[str]:
    # Contents rather than tokens: those are new in every process.
    return [
        digest(*(torch.as_tensor(a, device="cpu") for a in leaf.arrays))
        for leaf in expr.walk()
        if isinstance(leaf, ArrayLeaf)
    ]


def _numbers(problem: Problem, snapshot: Snapshot, rounding: float) -> Options:
    """Numbers that model and loss compute, which may differ by rounding: of another machine, number of threads, or batches."""
    kept = problem.cached(snapshot).get("numbers", None, lambda: numbers(problem))
    tolerance = max(torch.finfo(problem.dtype).eps ** 0.5, rounding)
    return {name: _sums(found, tolerance) for name, found in kept.items()}


def _data(problem: Problem) -> str | list[list[float]] | None:
    """The bits of data that lie in memory; of a loader, and of several processes, the sums that passes are compared by."""
    if not problem.group.alone:
        every = [part for part in problem.group.objects(problem.data.sums()) if part]
        return _sums(total(every), TOLERANCE)
    if problem.data.fixed:
        return digest(*trees.tensors(problem.data.source))
    return None if (found := problem.data.contents) is None else _sums(found, TOLERANCE)


def _sums(found: Fingerprint, tolerance: float) -> list[list[float]]:
    """Sums, each with how far another run's may be from it; see :func:`curvalg.runs.checkpoint.same_sums`."""
    return [[value, tolerance * (most + tolerance)] for value, most in found]

"""The numbers of diagonal matrices: of a leaf, and of a sub-matrix over entries of one."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from curvalg.expr import Diagonal, EntryRestriction, Expr, Restriction, Sum
from curvalg.expr.affine_form import affine
from curvalg.lowering.blocks.chosen_entries import choose_entries
from curvalg.lowering.blocks.submatrices import places
from curvalg.problem import Problem
from curvalg.problem.model import parameters as params_
from curvalg.tensors.memory import widest

DIAGONAL = (Diagonal, EntryRestriction)
"""What may have values."""


def diagonal_values(expr: Expr, problem: Problem) -> Any | None:
    """The values of a diagonal leaf, or of a sub-matrix over entries of such; None for anything else."""
    if isinstance(expr, Diagonal):
        return expr.values
    if not isinstance(expr, EntryRestriction):
        return None
    if isinstance(expr.expr, Diagonal):  # made of the sub-matrix itself
        return expr.expr.values
    inner = _inside(expr.expr, problem)
    return None if inner is None else choose_entries(problem, expr.entries).take(inner)


@singledispatch
def _inside(expr: Expr, problem: Problem) -> Tensor | None:
    """The values over the parameters that the entries are of."""
    return None


@_inside.register
def _(expr: Restriction, problem: Problem) -> Tensor | None:
    restricted = problem.restricted(expr.params)
    if not isinstance(expr.expr, Diagonal) or expr.expr.size not in (problem.size, restricted.size):
        return None
    values = torch.as_tensor(expr.expr.values, device=problem.device).to(widest(problem.device))
    if expr.expr.size == restricted.size:
        return values
    return places(problem, params_.match(expr.params, problem.layout.names)).take(values)


@_inside.register
def _(expr: Sum, problem: Problem) -> Tensor | None:
    parts, shift = affine(expr)
    total = None
    for c, part in parts:
        if (values := _inside(part, problem)) is None:
            return None
        total = c * values if total is None else total + c * values
    return None if total is None else total + shift

"""The matrix J Jᵀ of all outputs (the neural tangent kernel), from layer inputs and output deltas."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from curvalg.expr import Expr, Transpose
from curvalg.expr.nodes.products import Product
from curvalg.expr.term import Term
from curvalg.expr.terms import Jacobian
from curvalg.lowering.low_rank.all_columns import columns_of
from curvalg.problem import Batch, Problem, Snapshot
from curvalg.tensors.memory import wide


@dataclass(frozen=True)
class Outputs(Term):
    """The matrix JᵀJ as V Vᵀ, with a column of V for every output: VᵀV is then J Jᵀ."""

    def factor(self, batch: Batch) -> Tensor:
        z = batch.output
        numbers = math.prod(z.shape[1:])
        units = torch.eye(numbers, dtype=z.dtype, device=z.device).reshape(numbers, 1, *z.shape[1:])
        return units.expand(numbers, *z.shape)

    def factor_columns(self, batch: Batch) -> int:
        return math.prod(batch.output.shape[1:])


def is_kernel(expr: Expr) -> bool:
    """Whether an expression is J Jᵀ."""
    return isinstance(expr, Product) and expr.factors == (Jacobian(), Transpose(Jacobian()))


def kernel(problem: Problem, snapshot: Snapshot) -> Tensor:
    """The kernel J Jᵀ (M, M), rows in the order of the data, float64 (computed in the problem's precision)."""
    return problem.cached(snapshot).get("kernel", None, lambda: _make(problem, snapshot), budgeted=True)


def _make(problem: Problem, snapshot: Snapshot) -> Tensor:
    factor = columns_of(problem, snapshot, (Outputs(),))
    gram = factor.gram(problem, snapshot)
    # Columns lie by output and row, outputs of the data by row and output.
    order, start = [], 0
    for columns, rows in factor.sizes:
        block = torch.arange(start, start + columns * rows, device=gram.device)
        order.append(block.reshape(columns, rows).T.reshape(-1))
        start += columns * rows
    places = torch.cat(order)
    return wide(gram[places][:, places])

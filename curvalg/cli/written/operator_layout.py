"""The parameters that an operator acts on, in their order."""

from __future__ import annotations

from curvalg.lowering import CurvatureOperator
from curvalg.lowering.blocks.chosen_entries import part_layout
from curvalg.problem import Layout


def layout_of(op: CurvatureOperator) -> Layout | None:
    """The layout of the vectors that an operator takes; None where these are outputs.

    >>> import torch
    >>> from curvalg import Problem, parse
    >>> problem = Problem(torch.nn.Linear(3, 2), torch.nn.MSELoss(), (torch.randn(5, 3), torch.randn(5, 2)))
    >>> layout_of(parse("restrict(ggn, 'bias')").lower(problem)).names
    ['bias']
    """
    if op.expr.domain == "outputs":
        return None
    return part_layout(op.problem, op.expr.domain_params)

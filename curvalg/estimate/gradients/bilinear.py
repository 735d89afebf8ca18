"""Bilinear forms of an operator."""

from __future__ import annotations

from torch import Tensor

from curvalg.distributed.group import shared_call
from curvalg.estimate.target import require_operator
from curvalg.lowering import CurvatureOperator
from curvalg.lowering.vectors import Vector, parse
from curvalg.tensors.memory import wide


@shared_call
def bilinear(op: CurvatureOperator, left: Vector, right: Vector) -> Tensor:
    """Bilinear forms gᵀ A h of an operator, for all columns of both sides, float64 (P, Q).

    With ``inverse(A + c * Identity)`` the forms gᵀ(A + c I)⁻¹h of influence functions and posterior covariances, by one solve
    for each column of the right side.

    Args:
        op: an operator (m, n).
        left: g, (m,) or (m, P), of any kind that a product takes.
        right: h, (n,) or (n, Q).

    Raises:
        VectorError: vectors that do not fit.

    >>> import torch
    >>> from curvalg import Identity, Problem, inverse, registry
    >>> problem = Problem(torch.nn.Linear(3, 1), torch.nn.MSELoss(), (torch.randn(6, 3), torch.randn(6, 1)))
    >>> op = inverse(registry.build("ggn") + 0.1 * Identity).lower(problem)
    >>> bilinear(op, problem.gradient(), torch.eye(4)).shape
    torch.Size([1, 4])
    """
    require_operator(op, "bilinear")
    g = parse(left, op._codomain, op._codomain).columns
    h = parse(right, op._domain, op._domain).columns
    product: Tensor = op @ h
    return op._codomain.vectors.gram(wide(g).T.contiguous(), wide(product).T.contiguous())

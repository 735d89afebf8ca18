"""Inner products of many gradients with the solution of one system: influence functions."""

from __future__ import annotations

import torch
from torch import Tensor

from curvalg.errors import ExpressionError
from curvalg.estimate.target import require_operator
from curvalg.lowering import CurvatureOperator
from curvalg.lowering.vectors import Vector, parse
from curvalg.tensors.memory import wide


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
    return wide(g).T @ wide(product)


def influence(op: CurvatureOperator, gradients: Vector) -> Tensor:
    """Inner products ⟨∇cₙ, A v⟩ of every sample n for some gradients v, shape (N, P), without a gradient per sample.

    With A = (H + λ I)⁻¹ at a minimiser of L and v = ∇ℓ of a test loss, it predicts by how much that test loss changes when
    sample n is left out of the training data: θ moves by (H + λ I)⁻¹ ∇cₙ. One solve for each column and one pass over the
    data. Koh and Liang, arXiv 1703.04730.

    Args:
        op: an operator on parameters, such as ``inverse(registry.build("ggn") + 1e-2 * Identity).lower(problem)``.
        gradients: v, (D,) or (D, P), of any kind that a product takes.

    Returns:
        Samples in the order of the data; with ``samples="position"`` the positions of a row follow each other in row-major
        order. (N,) for a single vector.

    Raises:
        ExpressionError: the operator is not one on all parameters of its problem.
        VectorError: vectors that do not fit.

    >>> import torch
    >>> from curvalg import Identity, Problem, inverse, registry
    >>> problem = Problem(torch.nn.Linear(3, 1), torch.nn.MSELoss(), (torch.randn(6, 3), torch.randn(6, 1)))
    >>> op = inverse(registry.build("hessian") + 0.1 * Identity).lower(problem)
    >>> influence(op, problem.gradient()).shape
    torch.Size([6])
    """
    require_operator(op, "influence")
    problem, snapshot = op.problem, op.snapshot
    if op.expr.domain != "parameters" or op.expr.codomain != "parameters" or op.shape[0] != problem.size:
        raise ExpressionError(
            f"influence: expected an operator on all {problem.size} parameters, but {op.expr} is {op.shape[0]} x {op.shape[1]}"
        )
    operand = parse(gradients, op._domain, op._domain)
    solved = op @ operand.columns
    parts: list[Tensor] = []
    with problem.differentiating():
        for evaluation in problem.evaluations(snapshot, order_matters=True):
            columns: list[Tensor] = []
            for x in solved.unbind(1):
                batch, tangent = evaluation.push(x)
                columns.append(batch.dot(batch.loss_gradient, tangent).reshape(-1))
            parts.append(torch.stack(columns, 1))
    result = torch.cat(parts)
    return result[:, 0] if result.shape[1] == 1 and _single(gradients, op) else result


def _single(vector: Vector, op: CurvatureOperator) -> bool:
    return getattr(vector, "ndim", None) == 1 or not hasattr(vector, "ndim")

"""A third party's term that gives its factor takes part in everything that stands on it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from curvalg import ExpressionError, Facts, Identity, Term, block_diagonal, diagonal_part, inverse, sqrt


@dataclass(frozen=True)
class SquaredOutputs(Term):
    """Σₙ Jₙᵀ Jₙ."""

    scale: float = 1.0

    def facts(self, loss=None):
        return Facts(psd=True)

    def cotangent_dot(self, batch, tangent):
        return self.scale * tangent

    def factor(self, batch):
        return self.scale**0.5 * batch.spread(torch.ones_like(batch.output)[None], elementwise=True)


@dataclass(frozen=True)
class WrongShape(SquaredOutputs):
    def factor(self, batch):
        return torch.ones(3)


def test_inverses_roots_diagonals_and_blocks(problem_of, dense_of, vectors):
    dense, problem = dense_of("mlp"), problem_of("mlp")
    A = 2 * dense.jacobian.T @ dense.jacobian
    V, eye = vectors(dense.D), torch.eye(dense.D).double()
    term = SquaredOutputs(2.0)
    op = inverse(term + Identity).lower(problem)
    assert "gram: chosen" in op.explain()
    assert torch.allclose(op @ V, torch.linalg.solve(A + eye, V), atol=1e-10)
    root = sqrt(term + Identity).lower(problem)
    assert torch.allclose(root @ (root @ V), A @ V + V, atol=1e-9)
    assert torch.allclose(diagonal_part(term).lower(problem) @ V, A.diagonal()[:, None] * V, atol=1e-10)
    blocks = block_diagonal(term, by="module").lower(problem)
    assert "of squared_outputs(scale=2.0), factored" in blocks.explain()
    assert torch.allclose((blocks @ V)[:25], A[:25, :25] @ V[:25], atol=1e-10)


def test_a_factor_of_another_shape_is_refused(problem_of, vectors):
    problem = problem_of("mlp")
    with pytest.raises(ExpressionError, match=r"wrong_shape.factor must return a tensor of shape \(columns, 2, 3\)"):
        inverse(WrongShape() + Identity).lower(problem) @ vectors(problem.size)

"""``explain()`` stays readable: whole reports, written down as a person wants to read them."""

from __future__ import annotations

import textwrap

import pytest
import torch
from torch import nn

from curvalg import Identity, Problem, block_diagonal, inverse, registry, sqrt
from tests.support.structures import JointKronecker


def plan_of(op):
    """The plan section of a report."""
    lines = op.explain().splitlines()
    start, stop = lines.index("plan"), lines.index("execution")
    return textwrap.dedent("\n".join(lines[start + 1 : stop]))


def expected(text):
    return textwrap.dedent(text).strip("\n")


def test_an_exact_inverse(problem_of):
    op = inverse(registry.build("ggn") + 1e-3 * Identity).lower(problem_of("mlp"))
    assert plan_of(op) == expected("""
        inverse by gram
          diagonal: declined, the matrix is not made of diagonals and the identity
          kronecker: declined, the matrix is not one Kronecker product and the identity
          eigenbasis: declined, the matrix is not one Eigenbasis and the identity
          blocks: declined, the matrix is not block-diagonal
          woodbury: declined, the matrix has no low-rank summand
          gram: chosen, the Gram matrix of M = 14 columns once (1.53 KiB in float64), then a Cholesky factorisation for each damping (0.915 kFLOP)
          sum
            sweep: ggn
              recorded: tangent by two backward passes, then one backward
              kept from the first product on, within the budget
            0.001 * identity
        """)


def test_an_iterative_inverse_names_every_reason(problem_of, inside):
    inside(dense_limit=40)
    op = inverse(registry.build("hessian") + 2 * Identity, rtol=1e-6).lower(problem_of("mlp"))
    assert plan_of(op) == expected("""
        inverse by minres
          diagonal: declined, the matrix is not made of diagonals and the identity
          kronecker: declined, the matrix is not one Kronecker product and the identity
          eigenbasis: declined, the matrix is not one Eigenbasis and the identity
          blocks: declined, the matrix is not block-diagonal
          woodbury: declined, the matrix has no low-rank summand
          gram: declined, hessian is not of the form V Vᵀ with known V
          kernel: declined, the matrix is not J J.T and the identity
          function: declined, the matrix is not a function of another and the identity
          dense: declined, 43 rows are more than 40
          cg: declined, positive definiteness is not proved
          minres: chosen, at most 430 products to a relative residual of 1e-06
          sum
            sweep: hessian
              recorded: one backward for all terms
              kept from the first product on, within the budget
            2 * identity
        """)


def test_many_blocks_are_told_once():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(9)]).double()
    problem = Problem(model, nn.MSELoss(), (torch.randn(3, 2).double(), torch.randn(3, 2).double()))
    op = inverse(JointKronecker() + 0.5 * Identity).lower(problem).prepare()
    assert plan_of(op) == expected("""
        inverse by blocks
          diagonal: declined, the matrix is not made of diagonals and the identity
          kronecker: declined, the matrix is not one Kronecker product and the identity
          eigenbasis: declined, the matrix is not one Eigenbasis and the identity
          blocks: chosen, 9 blocks, 9 by kronecker
            over 0.weight, 0.bias:
              diagonal: declined, the matrix is not made of diagonals and the identity
              kronecker: chosen, eigendecompositions of 2 x 2 and 3 x 3 once (0.315 kFLOP), kept for every damping
              and alike over 1.weight, 1.bias; 2.weight, 2.bias; 3.weight, 3.bias; 4.weight, 4.bias and 4 more
          9 diagonal blocks, one after the other
            over 0.weight, 0.bias:
              sum
                arrays: Kronecker<2 x 3, float64>
                0.5 * identity
              and alike over 1.weight, 1.bias; 2.weight, 2.bias; 3.weight, 3.bias; 4.weight, 4.bias and 4 more
        """)


def test_square_roots_and_matrices_yet_to_be_made(problem_of):
    op = sqrt(JointKronecker() + Identity).lower(problem_of("mlp"))
    assert (
        plan_of(op)
        == "matrix: sqrt(joint_kronecker + identity), accumulated over the data at the first product and kept"
    )
    root = sqrt(registry.build("covariance") + Identity).lower(problem_of("mlp"))
    assert plan_of(root) == expected("""
        square root by gram
          diagonal: declined, the matrix is not made of diagonals and the identity
          kronecker: declined, the matrix is not one Kronecker product and the identity
          eigenbasis: declined, the matrix is not one Eigenbasis and the identity
          blocks: declined, the matrix is not block-diagonal
          woodbury: declined, the matrix has no low-rank summand
          gram: chosen, the Gram matrix of M = 7 columns once (0.383 KiB in float64), then a Cholesky factorisation for each damping (0.114 kFLOP)
          of covariance + identity
        """)


@pytest.mark.parametrize("by", ["module", "parameter"])
def test_factored_blocks_with_what_they_keep(by, problem_of, take_way):
    take_way("factored")
    problem = problem_of("mlp")
    op = block_diagonal(registry.build("ggn"), by=by).lower(problem)
    count = {"module": 2, "parameter": 4}[by]
    before = plan_of(op).splitlines()
    assert before[:2] == [
        f"{count} diagonal blocks of ggn, factored",
        "  two matrix products a layer, for all blocks together",
    ]
    op @ torch.ones(problem.size).double()
    assert "kept: " in plan_of(op) and "MiB" in plan_of(op)

"""What eigsh refuses, and the words it uses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator

from curvalg import CheckpointError, ExpressionError, FactsError, Problem, ProblemError, VectorError, registry
from curvalg.estimate import eigsh, svds
from tests.support.spectra import SPECTRA, matrix

A = matrix(SPECTRA["decaying"])
n = len(A)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "expected 1 ≤ k ≤ 120 for 120 rows, got k=0"),
        ({"k": -1}, "got k=-1"),
        ({"k": n + 1}, "expected 1 ≤ k ≤ 120 .* got k=121"),
        ({"k": 2.0}, "expected an integer k ≥ 1, got 2.0"),
        ({"k": True}, "expected an integer k"),
        ({"which": "SM"}, "expected which to be one of 'LA', 'SA', 'LM', 'BE', got 'SM'; .* inverse"),
        ({"which": "la"}, "expected which to be one of"),
        ({"which": ["LA"]}, "expected which to be one of"),
        ({"tol": -1e-3}, "expected a relative tolerance 0 ≤ tol < 1, got -0.001"),
        ({"tol": float("nan")}, "expected a relative tolerance"),
        ({"tol": "small"}, "expected a relative tolerance"),
        ({"block": 0}, "expected block to be 'auto' or an integer ≥ 1, got 0"),
        ({"block": 1.5}, "expected block"),
        ({"block": "wide"}, "expected block"),
        ({"maxiter": 0}, "expected maxiter"),
        ({"on_fail": "ignore"}, "expected on_fail to be 'raise' or 'warn', got 'ignore'"),
        (
            {"k": 119, "deflate": np.eye(n)[:, :2]},
            "expected 1 ≤ k ≤ 118 for 120 rows of which 2 are deflated, got k=119",
        ),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ExpressionError, match=message):
        eigsh(A, **options)


def test_vectors_that_do_not_fit():
    with pytest.raises(
        VectorError, match=r"deflate: expected shape \(120,\) or \(120, K\), got a tensor of shape \(5, 2\)"
    ):
        eigsh(A, deflate=torch.ones(5, 2))
    with pytest.raises(VectorError, match="deflate: expected vectors that are not zero"):
        eigsh(A, deflate=torch.zeros(n, 1))
    with pytest.raises(VectorError, match="v0: expected shape"):
        eigsh(A, v0=torch.ones(3))
    with pytest.raises(VectorError, match="v0"):
        eigsh(A, v0=torch.full((n,), torch.nan))


def test_operators_that_are_not_symmetric():
    data = (torch.randn(5, 30), torch.arange(5) % 3)
    problem = Problem(torch.nn.Linear(30, 3), torch.nn.CrossEntropyLoss(), data)
    J, H, G = (registry.build(name).lower(problem) for name in ("jacobian", "hessian", "ggn"))
    with pytest.raises(FactsError, match=r"expected a square operator, but jacobian is 15 x 93; .*svds"):
        eigsh(J)
    with pytest.raises(FactsError, match=r"expected a symmetric operator, but .* is not known to be symmetric"):
        eigsh(H @ G)
    skew = torch.triu(A)
    for op in (skew, LinearOperator(A.shape, matvec=lambda x: skew.numpy() @ x, dtype=float)):
        with pytest.raises(FactsError, match="expected a symmetric operator, but for random x and y xᵀAy = "):
            eigsh(op)


def test_products_that_are_not_finite():
    count = [0]

    def product(x):
        count[0] += 1
        return A.numpy() @ x if count[0] < 12 else np.full_like(x, np.inf)

    op = LinearOperator(A.shape, matvec=product, dtype=float)
    with pytest.raises(
        ProblemError, match="expected finite products, but the 120 x 120 _CustomLinearOperator gave NaN or inf"
    ):
        eigsh(op, block=1)


def test_things_that_are_no_operators():
    with pytest.raises(ExpressionError, match=r"got Sum; an expression becomes an operator by expr.lower\(problem\)"):
        eigsh(registry.build("hessian") + registry.build("ggn"))
    for wrong in (torch.ones(3), torch.ones(3, 3).int(), torch.ones(3, 3).cfloat()):
        with pytest.raises(ExpressionError, match="expected a matrix of real floating-point numbers"):
            eigsh(wrong)
    with pytest.raises(ExpressionError, match="expected a real operator, got dtype complex128"):
        eigsh(np.eye(3) * 1j)


def test_singular_values_of_which_there_are_too_few():
    with pytest.raises(ExpressionError, match=r"expected 1 ≤ k ≤ 2 for the 2 x 3 matrix of shape \(2, 3\), got k=3"):
        svds(torch.ones(2, 3), 3)


def test_a_place_without_a_folder_is_refused_before_an_exact_answer(tmp_path):
    op = torch.eye(3)
    with pytest.raises(CheckpointError, match="existing folder"):
        eigsh(op, 1, checkpoint=tmp_path / "missing" / "run.safetensors")


def test_tiny_symmetric_matrices_are_symmetric():
    assert torch.allclose(eigsh(1e-30 * torch.eye(4), 2).eigenvalues, torch.tensor([1e-30, 1e-30]).double())

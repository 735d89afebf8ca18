"""The operator as SciPy sees it, its algebra, and its messages."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
from torch import nn

from curvalg import (
    CurvatureOperator,
    ExpressionError,
    Identity,
    ProblemError,
    StaleError,
    inverse,
    registry,
)
from tests.support.zoo import make

# -- SciPy --------------------------------------------------------------------------------------------------------------


def test_scipy_solvers_accept_it(ggn):
    A = ggn.to_dense().numpy()
    n = len(A)
    b = np.linspace(-1, 1, n)
    w = np.linalg.eigvalsh(A)
    assert isinstance(ggn, sla.LinearOperator)
    assert sla.aslinearoperator(ggn) is ggn
    np.testing.assert_allclose(sla.eigsh(ggn, k=3, v0=b)[0], w[-3:], rtol=1e-8)
    np.testing.assert_allclose(np.sort(sla.svds(ggn, k=3, v0=b)[1]), w[-3:], rtol=1e-8)
    X = np.linalg.qr(np.random.default_rng(0).standard_normal((n, 3)))[0]
    np.testing.assert_allclose(np.sort(sla.lobpcg(ggn, X, tol=1e-10, maxiter=200)[0]), w[-3:], rtol=1e-6)
    for solver in (sla.cg, sla.minres):
        np.testing.assert_allclose(A @ solver(ggn, b, rtol=1e-10)[0], b, atol=1e-7)
    np.testing.assert_allclose(sla.expm_multiply(ggn, b, traceA=np.trace(A)), np.asarray(_expm(A) @ b), rtol=1e-8)


def _expm(A):
    w, V = np.linalg.eigh(A)
    return V @ np.diag(np.exp(w)) @ V.T


def test_rectangular_svds(problem_of):
    J = registry.build("jacobian").lower(problem_of("mlp"))
    s = np.linalg.svd(J.to_dense().numpy(), compute_uv=False)
    np.testing.assert_allclose(np.sort(sla.svds(J, k=3, v0=np.ones(min(J.shape)))[1])[::-1], s[:3], rtol=1e-8)


def test_scipy_arithmetic_with_foreign_operators(ggn):
    n = ggn.shape[0]
    foreign = sla.aslinearoperator(np.diag(np.arange(n, dtype=float)))
    A, F, x = ggn.to_dense().numpy(), np.diag(np.arange(n)), np.ones(n)
    for op, dense in (
        (ggn + foreign, A + F),
        (foreign + ggn, A + F),
        (ggn @ foreign, A @ F),
        (foreign @ ggn, F @ A),
        (ggn - foreign, A - F),
        (2j * ggn, 2j * A),
        (ggn.H @ foreign, A.T @ F),
    ):
        np.testing.assert_allclose(op @ x, dense @ x, rtol=1e-10)


# -- bound algebra ---------------------------------------------------------------------------------------------------------


def test_operators_of_one_problem_combine_as_expressions(problem_of, vectors):
    problem = problem_of("mlp")
    h, g = (registry.build(n).lower(problem) for n in ("hessian", "ggn"))
    H, G, V = h.to_dense(), g.to_dense(), vectors(problem.size)
    for op, dense, text in (
        (h + g, H + G, "hessian + ggn"),
        (h - 2 * g, H - 2 * G, "hessian - 2*ggn"),
        (h @ g, H @ G, "hessian @ ggn"),
        (-h / 4, -H / 4, "-0.25*hessian"),
        (h**2, H @ H, "hessian @ hessian"),
        (h + 0.5 * Identity, H + torch.eye(len(H)) / 2, "hessian + 0.5*identity"),
        ((h @ g).T, G @ H, "(hessian @ ggn).T"),
        (h * 3.0, 3 * H, "3*hessian"),
    ):
        assert isinstance(op, CurvatureOperator)
        assert str(op.expr) == text
        assert torch.allclose(op @ V, dense @ V, atol=1e-12)


def test_operators_of_different_problems_combine_lazily(problem_of):
    a, b = (registry.build("ggn").lower(problem_of("mlp", options)) for options in (None, make("mlp", 1).batches))
    both = a + b
    x = np.ones(a.shape[0])
    assert not isinstance(both, CurvatureOperator)
    np.testing.assert_allclose(both @ x, a @ x + b @ x)


# -- one model call per batch and product -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mlp", "cnn", "lstm", "tied_embedding"])
def test_a_sum_calls_the_model_once_per_batch_and_product(model, counted_model):
    problem, calls = counted_model(model, cache=0, verify=False)
    build = registry.build
    op = (2 * build("hessian") + build("ggn") - 3 * build("covariance")).lower(problem)
    v = torch.ones(problem.size).double()
    for _ in range(3):
        before = calls()
        op @ v
        assert calls() - before == len(problem.data.source) == 3


def test_a_sum_without_u_calls_it_twice(counted_model):
    problem, calls = counted_model("mlp", cache=0, verify=False)
    op = (registry.build("ggn") + registry.build("covariance")).lower(problem)
    before = calls()
    op @ torch.ones(problem.size).double()
    assert calls() - before == 2 * 3


def test_lowering_calls_no_model(counted_model):
    problem, calls = counted_model("mlp")
    (registry.build("hessian") + registry.build("centered_covariance")).lower(problem).explain()
    assert calls() == 0


# -- messages ------------------------------------------------------------------------------------------------------------------------


def test_lowering_needs_a_problem_and_a_size(problem_of):
    with pytest.raises(ExpressionError, match=r"curvalg\.Problem"):
        registry.build("ggn").lower(nn.Linear(2, 2))
    problem = problem_of("mlp")
    assert (2 * Identity).lower(problem).shape == (problem.size, problem.size)
    with pytest.raises(ExpressionError, match="preconditioner"):
        registry.build("ggn").lower(problem, preconditioner=Identity)


def test_dense_checks_memory_first(problem_of, inside):
    op = registry.build("ggn").lower(problem_of("mlp"))
    inside(free_memory_of_dense=lambda device: 1000)
    with pytest.raises(ProblemError, match="GiB"):
        op.to_dense()


def test_explain_says_what_happens(problem_of):
    build = registry.build
    op = (2 * build("hessian") + build("fisher") - build("centered_covariance").T + 1e-3 * Identity).lower(
        problem_of("mlp")
    )
    text = op.explain()
    for part in (
        "2*hessian + fisher - centered_covariance.T + 0.001*identity",
        "2*hessian + ggn - centered_covariance + 0.001*identity",
        "by Fisher of a natural likelihood",
        "by transpose of a symmetric matrix",
        "sweep: 2*hessian + ggn - centered_covariance",
        "recorded: one backward for the tangent, one for the product",
        "7 rows, N = 7 samples",
        "symmetric: yes",
    ):
        assert part in text, part


def test_a_stale_operand_on_either_side_is_refused(problem_of):
    case = make("mlp")
    problem = problem_of(case)
    old = registry.build("ggn").lower(problem)
    with torch.no_grad():
        case.model[0].weight.add_(1.0)
    new = registry.build("hessian").lower(problem)
    for combine in (lambda: old + new, lambda: new + old, lambda: new @ old, lambda: new - old):
        with pytest.raises(StaleError):
            combine()


def test_operators_and_numbers(problem_of, vectors):
    op = registry.build("ggn").lower(problem_of("mlp"))
    v = vectors(op.shape[0], 1)[:, 0]
    assert torch.allclose((op * torch.tensor(2.0)) @ v, 2 * (op @ v))
    assert torch.allclose((torch.tensor(2.0) * op) @ v, 2 * (op @ v))
    for wrong, message in (
        (lambda: op + 0.1, "ambiguous"),
        (lambda: op / op, "inverse"),
        (lambda: op - 1, "ambiguous"),
    ):
        with pytest.raises(ExpressionError, match=message):
            wrong()


def test_preconditioners_in_the_algebra_of_operators(problem_of, vectors):
    problem = problem_of("mlp")
    calls = [0]

    def P(v):
        calls[0] += 1
        return v

    solve = inverse(registry.build("ggn") + 0.1 * Identity, solver="cg")
    inv, h = solve.lower(problem, preconditioner=P), registry.build("hessian").lower(problem)
    v = vectors(problem.size, 1)[:, 0]
    for op in (h + inv, inv + h, h @ inv):
        before = calls[0]
        op @ v
        assert calls[0] > before
    assert (inv - inv).shape == inv.shape
    with pytest.raises(ExpressionError, match="different preconditioners"):
        inv + solve.lower(problem)
    with pytest.raises(ExpressionError, match="a preconditioner is"):
        solve.lower(problem, preconditioner=3)
    assert "not needed" in inverse(registry.build("ggn") + Identity).lower(problem, preconditioner=P).explain()

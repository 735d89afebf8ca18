"""Inverses: right to the asked tolerance, by the strategy that the facts allow, and loud where they fail."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg as sla
import torch
from torch import nn

from curvalg import (
    ConvergenceError,
    CurvalgWarning,
    Diagonal,
    ExpressionError,
    FactsError,
    Identity,
    Problem,
    VectorError,
    estimate,
    inverse,
    registry,
    restrict,
)

GGN = registry.build("ggn")
HESSIAN = registry.build("hessian")


@pytest.fixture
def problem(problem_of):
    return problem_of("mlp")


@pytest.fixture
def dense(dense_of):
    return dense_of("mlp")


def eye(n):
    return torch.eye(n).double()


@pytest.mark.parametrize("columns", [1, 4])
@pytest.mark.parametrize("solver", ["auto", "dense", "cg", "minres"])
def test_damped_ggn_to_the_asked_tolerance(solver, columns, problem, dense, vectors):
    op = inverse(GGN + 1e-2 * Identity, solver=solver, rtol=1e-9).lower(problem)
    B = vectors(dense.D, columns)
    X = op @ B
    A = dense.ggn + 1e-2 * eye(dense.D)
    residual = (B - A @ X).norm(dim=0)
    assert (residual <= 1e-9 * B.norm(dim=0) * 1.001).all()
    assert op.last_solve.ok
    assert torch.allclose(op.last_solve.residual, residual, rtol=1e-2, atol=1e-12)
    assert op.facts.positive_definite is True


def test_single_precision_reaches_its_default_tolerance(dense, vectors):
    from curvalg import Problem
    from tests.support.zoo import make

    case = make("mlp")
    model, batches = case.model.float(), [(x.float(), y) for x, y in case.batches]
    problem = Problem(model, case.loss, batches)
    B = vectors(dense.D, 2).float()
    for solver in ("cg", "minres", "dense"):
        op = inverse(GGN + 1e-2 * Identity, solver=solver).lower(problem)
        X = op @ B
        residual = B - (dense.ggn.float() + 1e-2 * torch.eye(dense.D)) @ X
        assert (residual.norm(dim=0) <= 3e-5 * B.norm(dim=0)).all()


def test_an_indefinite_hessian_goes_to_minres(problem, dense, vectors, inside):
    inside(dense_limit=10)
    op = inverse(HESSIAN + 1e-2 * Identity).lower(problem)
    B = vectors(dense.D, 2)
    A = dense.hessian + 1e-2 * eye(dense.D)
    assert torch.linalg.eigvalsh(A)[0] < 0
    assert torch.allclose(A @ (op @ B), B, atol=1e-6)
    text = op.explain()
    assert "dense: declined, 43 rows are more than 10" in text
    assert "cg: declined, positive definiteness is not proved" in text
    assert "minres: chosen" in text


def test_cg_forced_on_it_reports_non_positive_curvature(problem, vectors):
    op = inverse(HESSIAN - 0.3 * Identity, solver="cg").lower(problem)
    with pytest.raises(ConvergenceError, match="non-positive curvature") as caught:
        op @ vectors(problem.size, 2)
    assert caught.value.result.x.shape == (problem.size, 2)
    assert not caught.value.result.ok


def test_non_convergence_raises_with_the_best_iterate_or_warns(problem, dense, vectors):
    B = vectors(dense.D, 2)
    A = dense.ggn + 1e-6 * eye(dense.D)
    with pytest.raises(ConvergenceError, match="3 iterations were not enough") as caught:
        inverse(GGN + 1e-6 * Identity, solver="minres", maxiter=3).lower(problem) @ B
    result = caught.value.result
    assert torch.allclose(result.residual, (B - A @ result.x).norm(dim=0))
    assert (result.residual < B.norm(dim=0)).all()
    op = inverse(GGN + 1e-6 * Identity, solver="minres", maxiter=3, on_fail="warn").lower(problem)
    with pytest.warns(CurvalgWarning, match="did not solve"):
        X = op @ B
    assert torch.allclose(X, result.x)


def test_solve_reports_per_column_in_the_kind_of_b(problem, dense, vectors):
    op = inverse(GGN + 1e-2 * Identity, solver="cg").lower(problem)
    b = vectors(dense.D, 1)[:, 0]
    tree = problem.layout.unflatten(b)
    assert set(op.solve(tree).x) == set(tree)
    assert isinstance(op.solve(b.numpy()).x, np.ndarray)
    cold = op.solve(b)
    warm = op.solve(b, x0=cold.x)
    assert cold.iterations.item() > 0 and warm.iterations.item() == 0
    assert cold.converged.shape == cold.residual.shape == (1,)
    with pytest.raises(VectorError, match="x0"):
        op.solve(b, x0=vectors(dense.D, 2))
    with pytest.raises(ExpressionError, match="operators that are an inverse"):
        GGN.lower(problem).solve(b)


def test_scaled_inverses_solve_too(problem, dense, vectors):
    b = vectors(dense.D, 1)[:, 0]
    op = (3 * inverse(GGN + 1e-2 * Identity, solver="cg", rtol=1e-10)).lower(problem)
    expected = 3 * torch.linalg.solve(dense.ggn + 1e-2 * eye(dense.D), b)
    assert torch.allclose(op.solve(b).x, expected, atol=1e-6)
    assert op.solve(b, x0=expected).iterations.item() <= 1


@pytest.mark.parametrize("how", ["expression", "when lowered", "callable", "operator", "foreign operator"])
def test_preconditioners(how, problem, dense, vectors):
    A = GGN + 1e-4 * Identity
    near = dense.ggn + 2e-4 * eye(dense.D)
    inverse_near = torch.linalg.inv(near)
    leaf = GGN + 2e-4 * Identity
    options = {
        "expression": (inverse(A, solver="cg", preconditioner=leaf), None),
        "when lowered": (inverse(A, solver="cg"), leaf),
        "callable": (inverse(A, solver="cg"), lambda v: inverse_near @ v),
        "operator": (inverse(A, solver="cg"), inverse(leaf).lower(problem)),
        "foreign operator": (inverse(A, solver="cg"), sla.aslinearoperator(inverse_near.numpy())),
    }
    expr, given = options[how]
    B = vectors(dense.D, 2)
    plain = inverse(A, solver="cg").lower(problem)
    plain @ B
    op = expr.lower(problem, preconditioner=given)
    X = op @ B
    assert ((dense.ggn + 1e-4 * eye(dense.D)) @ X - B).norm() <= 1e-7 * B.norm()
    assert (op.last_solve.iterations < plain.last_solve.iterations / 2).all()


def test_a_preconditioner_made_of_a_matrix_term(problem, dense, vectors):
    P = registry.build("covariance_diagonal") + 1e-2 * Identity
    op = inverse(GGN + 1e-2 * Identity, solver="cg", preconditioner=P).lower(problem)
    B = vectors(dense.D, 2)
    assert ((dense.ggn + 1e-2 * eye(dense.D)) @ (op @ B) - B).norm() <= 1e-7 * B.norm()


def test_products_powers_and_adjoints_of_inverses(problem, dense, vectors):
    V = vectors(dense.D, 2)
    A, H = dense.ggn + 0.1 * eye(dense.D), dense.hessian
    a = GGN + 0.1 * Identity
    Ainv = torch.linalg.inv(A)
    for expr, expected in (
        (a**-1, Ainv),
        (a**-2, Ainv @ Ainv),
        (inverse(a) @ HESSIAN, Ainv @ H),
        ((inverse(a) @ HESSIAN).T, H @ Ainv),
        (HESSIAN @ inverse(a) @ HESSIAN - 0.5 * inverse(a), H @ Ainv @ H - 0.5 * Ainv),
        (inverse(GGN @ HESSIAN + 0.1 * Identity).T, torch.linalg.inv(dense.ggn @ H + 0.1 * eye(dense.D)).T),
        (inverse(inverse(a)), A),
        (restrict(inverse(a), "2.*"), Ainv[25:, 25:]),
        (inverse(restrict(a, "2.*")), torch.linalg.inv(A[25:, 25:])),
    ):
        op = expr.lower(problem)
        W = V[: op.shape[1]]
        assert torch.allclose(op @ W, expected @ W, atol=1e-7), str(expr)


def test_scipy_takes_inverses(problem, dense):
    op = inverse(GGN + 0.1 * Identity).lower(problem)
    Ainv = torch.linalg.inv(dense.ggn + 0.1 * eye(dense.D)).numpy()
    x = np.linspace(-1, 1, dense.D)
    np.testing.assert_allclose(op.matvec(x), Ainv @ x, atol=1e-8)
    np.testing.assert_allclose(op.rmatvec(x), Ainv.T @ x, atol=1e-8)
    np.testing.assert_allclose(x @ op, x @ Ainv, atol=1e-8)
    np.testing.assert_allclose(op.H @ x, Ainv @ x, atol=1e-8)
    w = sla.eigsh(op, k=2, v0=x)[0]
    np.testing.assert_allclose(w, np.linalg.eigvalsh(Ainv)[-2:], rtol=1e-8)


def test_diagonals_divide(problem, vectors):
    values = torch.linspace(1, 2, problem.size).double()
    D = Diagonal(values)
    V = vectors(problem.size, 2)
    op = inverse(2 * D + 3 * Identity).lower(problem)
    assert torch.allclose(op @ V, V / (2 * values + 3)[:, None], atol=1e-14)
    assert "diagonal: chosen" in op.explain()
    with pytest.raises(FactsError, match="43 of its eigenvalues are zero"):
        inverse(Diagonal(values * 0)).lower(problem) @ V


def test_singular_and_unsuitable_matrices_are_refused(problem, inside):
    with pytest.raises(FactsError, match="rank is at most M = 14, less than D = 43; add damping"):
        inverse(GGN).lower(problem)
    inside(dense_limit=10)
    with pytest.raises(FactsError, match="symmetry is not proved"):
        inverse(GGN @ HESSIAN + Identity).lower(problem)
    with pytest.raises(FactsError, match="diagonal: declined"):
        inverse(GGN + Identity, solver="diagonal").lower(problem)


def test_inverse_on_outputs(problem, dense, vectors):
    B = registry.build("loss_hessian")
    op = inverse(B + 0.5 * Identity).lower(problem)
    W = vectors(op.shape[0], 2)
    expected = torch.linalg.solve(dense.loss_hessian + 0.5 * eye(len(W)), W)
    assert torch.allclose(op @ W, expected, atol=1e-9)


def test_stale_inverses_raise(problem_of, vectors):
    from curvalg import StaleError
    from tests.support.zoo import make

    case = make("mlp")
    op = inverse(GGN + 0.1 * Identity).lower(problem_of(case))
    V = vectors(op.shape[0])
    before = op @ V
    with torch.no_grad():
        next(case.model.parameters()).mul_(1.3)
    for use in (lambda: op @ V, lambda: op.solve(V)):
        with pytest.raises(StaleError):
            use()
    assert not torch.allclose(op.refresh() @ V, before)


def test_exact_quantities_of_an_inverse_cost_what_its_products_take_anyway():
    torch.manual_seed(0)
    X, y = torch.randn(60, 40).double(), torch.randint(13, (60,))
    problem = Problem(nn.Linear(40, 13).double(), nn.CrossEntropyLoss(), (X, y))
    damped = registry.build("ggn") + 0.1 * Identity
    assert damped.lower(problem).exact_rows() == problem.size
    op = inverse(damped).lower(problem)
    assert op.exact_rows() == 0
    found = estimate.trace(op, products=20)
    assert found.error == 0.0
    assert found.value == pytest.approx(float(torch.linalg.inv(damped.lower(problem).to_dense()).trace()))

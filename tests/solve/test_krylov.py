"""CG and MINRES on many columns: right, frozen one by one, confirmed by true residuals, loud when they fail."""

from __future__ import annotations

import pytest
import torch

from curvalg import FactsError
from curvalg.solve import cg, factorize, minres


def matrix(spectrum: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64))[0]
    A = Q @ torch.diag(spectrum.double()) @ Q.T
    return (A + A.T) / 2


def rhs(n: int, columns: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DEFINITE = matrix(torch.logspace(-3, 0, 60))
INDEFINITE = matrix(torch.linspace(-1, 2, 60) + 0.013)


class Counted:
    """A product that counts the columns it was asked for."""

    def __init__(self, A):
        self.A, self.columns = A, []

    def __call__(self, x):
        self.columns.append(x.shape[1])
        return self.A @ x


@pytest.mark.parametrize("method", [cg, minres])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_reaches_the_tolerance_in_the_true_residual(method, preconditioned):
    B = rhs(60)
    P = torch.linalg.inv(DEFINITE + 1e-2 * torch.eye(60).double()) if preconditioned else None
    result = method(
        lambda x: DEFINITE @ x, B, rtol=1e-9, maxiter=2000, preconditioner=None if P is None else lambda r: P @ r
    )
    assert result.ok and result.reason == ("converged",) * 4
    true = (B - DEFINITE @ result.x).norm(dim=0)
    assert (true <= 1e-9 * B.norm(dim=0)).all()
    assert torch.allclose(result.residual, true)
    plain = method(lambda x: DEFINITE @ x, B, rtol=1e-9, maxiter=2000)
    if preconditioned:
        assert (result.iterations < plain.iterations / 2).all()


def test_minres_solves_indefinite_and_cg_reports_non_positive_curvature():
    B = rhs(60)
    assert minres(lambda x: INDEFINITE @ x, B, rtol=1e-8, maxiter=2000).ok
    result = cg(lambda x: INDEFINITE @ x, B, rtol=1e-8, maxiter=2000)
    assert not result.ok
    assert all("non-positive curvature" in reason for reason in result.reason)
    assert "4 of 4 columns did not converge (non-positive curvature" in result.summary()


@pytest.mark.parametrize("method", [cg, minres])
def test_columns_that_end_are_frozen(method):
    B = rhs(60)
    B[:, 0] = 0
    B[:, 1] = torch.linalg.eigh(DEFINITE)[1][:, -1]
    product = Counted(DEFINITE)
    result = method(product, B, rtol=1e-9, maxiter=2000)
    assert result.iterations[0] == 0 and result.iterations[1] == 1
    assert (result.x[:, 0] == 0).all()
    assert product.columns[0] == 3
    assert product.columns.count(3) <= 2  # the eigenvector leaves after one iteration
    alone = method(lambda x: DEFINITE @ x, B[:, 2:3], rtol=1e-9, maxiter=2000)
    assert torch.allclose(alone.x[:, 0], result.x[:, 2], rtol=1e-6)


@pytest.mark.parametrize("method", [cg, minres])
def test_warm_start(method):
    B = rhs(60)
    X = torch.linalg.solve(DEFINITE, B)
    assert (method(lambda x: DEFINITE @ x, B, x0=X, rtol=1e-8, maxiter=100).iterations == 0).all()
    near = X + 1e-6 * rhs(60, seed=5)
    started = near.clone()
    warm = method(lambda x: DEFINITE @ x, B, x0=near, rtol=1e-8, maxiter=2000)
    cold = method(lambda x: DEFINITE @ x, B, rtol=1e-8, maxiter=2000)
    assert warm.ok and (warm.iterations < cold.iterations).all()
    assert torch.equal(near, started)


@pytest.mark.parametrize("method", [cg, minres])
def test_running_out_of_iterations_keeps_the_best_iterate(method):
    B = rhs(60)
    result = method(lambda x: DEFINITE @ x, B, rtol=1e-12, maxiter=5)
    assert not result.ok
    assert all("5 iterations were not enough" in reason for reason in result.reason)
    assert torch.allclose(result.residual, (B - DEFINITE @ result.x).norm(dim=0))
    assert (result.residual <= B.norm(dim=0)).all()


@pytest.mark.parametrize("method", [cg, minres])
def test_a_tolerance_below_the_precision_is_not_claimed(method):
    A, B = matrix(torch.logspace(-6, 0, 60)).float(), rhs(60).float()
    result = method(lambda x: A @ x, B, rtol=1e-9, maxiter=3000)
    assert not result.ok
    true = (B - A @ result.x).norm(dim=0)
    assert (true > 1e-9 * B.norm(dim=0)).all()


@pytest.mark.parametrize("method", [cg, minres])
def test_a_product_that_drifts_is_caught_by_the_true_residual(method):
    calls = [0]

    def drifting(x):  # right at first; later products are of another matrix
        calls[0] += 1
        return DEFINITE @ x * (1.0 if calls[0] < 10 else 1.5)

    result = method(drifting, rhs(60), rtol=1e-9, maxiter=500)
    true = (rhs(60) - 1.5 * DEFINITE @ result.x).norm(dim=0)
    assert torch.allclose(result.residual, true)


@pytest.mark.parametrize("method", [cg, minres])
def test_one_by_one_and_zero_right_hand_sides(method):
    A = torch.tensor([[2.0]])
    result = method(lambda x: A @ x, torch.tensor([[4.0, 0.0]]), rtol=1e-6, maxiter=3)
    assert torch.allclose(result.x, torch.tensor([[2.0, 0.0]]))
    assert result.ok


def test_factorisations():
    B = rhs(60)
    for A, definite in ((DEFINITE, True), (INDEFINITE, False), (INDEFINITE, True)):
        assert torch.allclose(A @ factorize(A, positive_definite=definite)(B), B, atol=1e-9)
    with pytest.raises(FactsError, match="singular"):
        factorize(torch.ones(3, 3), positive_definite=None)


def test_minres_on_a_singular_matrix_is_never_worse_than_zero():
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 0.0])).double()
    b = torch.ones(6, 1).double()
    for maxiter in (3, 10, 60, 500):
        result = minres(lambda x: A @ x, b, rtol=1e-8, maxiter=maxiter)
        assert not result.ok
        assert result.residual <= b.norm() * (1 + 1e-12)
        assert torch.allclose(result.residual, (b - A @ result.x).norm(dim=0))
    big = matrix(torch.cat([torch.linspace(0.5, 2, 40), torch.zeros(20)]))
    result = minres(lambda x: big @ x, rhs(60), rtol=1e-8, maxiter=5000)
    assert (result.residual <= rhs(60).norm(dim=0)).all()


def test_preconditioners_that_cannot_be_right_are_named():
    for bad in (lambda r: r * torch.nan, lambda r: -r):
        result = cg(lambda x: DEFINITE @ x, rhs(60), rtol=1e-9, maxiter=100, preconditioner=bad)
        assert not result.ok
        assert all("preconditioner" in reason for reason in result.reason)


@pytest.mark.parametrize("seed", range(6))
def test_a_confirmed_iterate_is_the_one_that_is_given(seed):
    """Far from the start the recurrence may think too well of an iterate; what was confirmed counts, whatever it thought."""
    generator = torch.Generator().manual_seed(seed)
    d = torch.logspace(0, 3, 30, dtype=torch.float64)[:, None]
    b = torch.randn(30, 1, generator=generator, dtype=torch.float64)
    x0 = 1e5 * torch.randn(30, 1, generator=generator, dtype=torch.float64)
    result = cg(lambda x: d * x, b, x0=x0, rtol=1e-10, maxiter=600)
    assert result.ok, result.reason
    assert (b - d * result.x).norm() <= 1e-10 * b.norm()


@pytest.mark.parametrize("method", [cg, minres])
def test_zero_is_solved_by_zero_wherever_one_starts(method):
    d = torch.logspace(0, 2, 12, dtype=torch.float64)[:, None]
    b = torch.randn(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b[:, 0] = 0
    result = method(lambda x: d * x, b, x0=torch.ones_like(b), rtol=1e-8, maxiter=100)
    assert result.ok
    assert not result.x[:, 0].any()
    assert (d * result.x - b).norm() <= 1e-7 * b.norm()


EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("method", [cg, minres])
@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e15])
def test_a_solve_that_stagnates_at_rounding_has_converged_and_says_so(method, scale):
    """x is as right as products in float32 can tell: its backward error, in float64, is some units of rounding."""
    A = scale * matrix(torch.logspace(-4, 0, 80))
    b, single = rhs(80).float(), A.float()
    asked = {"rtol": 3e-7, "maxiter": 4000}
    result = method(lambda x: single @ x, b, rounding=EPS, **asked)
    assert result.ok and all("rounding of the products" in reason or reason == "converged" for reason in result.reason)
    assert any("rounding of the products" in reason for reason in result.reason)
    x, whole = result.x.double(), torch.linalg.matrix_norm(A, 2) * result.x.double().norm(dim=0) + b.norm(dim=0)
    assert bool(((A @ x - b).norm(dim=0) <= 70 * EPS * whole).all())
    assert torch.allclose(result.residual, (b - single @ result.x).norm(dim=0), rtol=0.5)
    assert not method(lambda x: single @ x, b, **asked).ok


@pytest.mark.parametrize("method", [cg, minres])
def test_what_is_more_than_rounding_is_not_excused(method):
    """Products that are 1e-7 off stop a solve far above the rounding of float64."""
    A, b = matrix(torch.linspace(0.01, 1, 60)), rhs(60)
    noise = torch.Generator().manual_seed(2)

    def inexact(x):
        product = A @ x
        return product * (1 + 1e-7 * torch.randn(product.shape, generator=noise, dtype=torch.float64))

    result = method(inexact, b, rtol=1e-12, maxiter=3000, rounding=torch.finfo(torch.float64).eps)
    assert not bool(result.converged.any())


@pytest.mark.parametrize("method", [cg, minres])
@pytest.mark.parametrize("smallest", [0.0, 1e-9])
def test_rounding_excuses_no_singular_matrix(method, smallest):
    """A huge x would make ε ‖A‖ ‖x‖ as large as b: what is left has to be a hundredth of b at most."""
    A = matrix(torch.cat([torch.full((20,), smallest), torch.linspace(0.1, 1, 40)])).float()
    b = rhs(60).float()
    result = method(lambda x: A @ x, b, rtol=1e-6, maxiter=3000, rounding=EPS)
    left = (A.double() @ result.x.double() - b).norm(dim=0) / b.norm(dim=0)
    assert not bool((result.converged & (left > 1e-2)).any())
    assert not result.ok

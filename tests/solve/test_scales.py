"""Solvers know no scale: right-hand sides, matrices and preconditioners times any power of two give the same digits."""

from __future__ import annotations

import pytest
import torch

from curvalg.solve import Trail, cg, exponents, minres, norms, scaled

N = 40
METHODS = {"cg": cg, "minres": minres}


def system(definite: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64))[0]
    values = torch.logspace(-1.5, 0, N).double() * (1 if definite else (-1.0) ** torch.arange(N))
    A = (q * values) @ q.T
    return ((A + A.T) / 2).float(), torch.randn(N, 3, generator=generator)


@pytest.fixture(params=["cg", "minres"])
def method(request):
    return METHODS[request.param]


@pytest.mark.parametrize("power", [-100, -60, 60, 100])
def test_powers_of_two_change_no_bit(method, power):
    A, B = system(method is cg)
    P = torch.diag(1 / A.diagonal().abs())
    options = {"rtol": 1e-5, "maxiter": 500, "preconditioner": lambda r: P @ r}
    plain = method(lambda x: A @ x, B, **options)
    assert plain.ok
    factor = torch.tensor(2.0**power)
    right = method(lambda x: A @ x, factor * B, **options)
    assert torch.equal(right.x, factor * plain.x)
    assert torch.equal(right.residual, factor * plain.residual) and torch.equal(right.history, factor * plain.history)
    left = method(lambda x: factor * (A @ x), B, **options)
    assert torch.equal(left.x, plain.x / factor) and torch.equal(left.residual, plain.residual)
    other = method(lambda x: A @ x, B, **{**options, "preconditioner": lambda r: factor * (P @ r)})
    assert torch.equal(other.x, plain.x)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e-8, 1e8, 1e20, 1e30, 1e36])
@pytest.mark.parametrize("start", [False, True])
def test_any_right_hand_side_has_the_error_of_scale_one(method, scale, start):
    A, B = system(method is cg)
    exact = torch.linalg.solve(A.double(), B.double())
    x0 = (scale * exact * (1 + 1e-2 * torch.randn(N, 1).double())).float() if start else None
    result = method(lambda x: A @ x, (scale * B.double()).float(), x0=x0, rtol=1e-5, maxiter=500)
    assert result.ok, result.summary()
    error = (result.x.double() / scale - exact).norm(dim=0) / exact.norm(dim=0)
    assert (error < 1e-2).all()  # the condition number times the tolerance
    true = (scale * B.double() - A.double() @ result.x.double()).norm(dim=0)
    assert (true <= 1.1e-5 * scale * B.double().norm(dim=0)).all()


def test_columns_of_all_scales_at_once_and_zero(method):
    A, B = system(method is cg)
    scales = torch.tensor([1e-30, 0.0, 1e30])
    result = method(lambda x: A @ x, B * scales, rtol=1e-5, maxiter=500)
    plain = method(lambda x: A @ x, B, rtol=1e-5, maxiter=500)
    assert result.ok and not result.x[:, 1].any()
    for k in (0, 2):
        assert torch.allclose(result.x[:, k] / scales[k], plain.x[:, k], rtol=1e-3, atol=1e-3 * plain.x[:, k].norm())


def test_absolute_tolerances_are_in_the_scale_of_the_user(method):
    A, B = system(method is cg)
    for scale in (1e-20, 1e20):
        atol = 1e-2 * scale
        result = method(lambda x: A @ x, scale * B, rtol=0.0, atol=atol, maxiter=500)
        true = norms((scale * B - A @ result.x).double())
        assert result.ok and (true <= 1.01 * atol).all() and (true > 1e-3 * atol).all()
    loose = method(lambda x: A @ x, 1e-20 * B, rtol=0.0, atol=1.0, maxiter=500)
    assert loose.ok and not loose.x.any() and not loose.iterations.any()


def test_what_is_not_finite_has_not_converged(method):
    A, B = system(method is cg)
    bad = B.clone()
    bad[0, 1] = torch.inf
    result = method(lambda x: A @ x, bad, rtol=1e-5, maxiter=500)
    assert result.converged.tolist() == [True, False, True] and "not finite" in result.reason[1]
    broken = method(lambda x: torch.full_like(x, torch.nan), B, rtol=1e-5, maxiter=50)
    assert not broken.converged.any()
    # The solution itself is out of range.
    far = method(lambda x: 1e-30 * (A @ x), 1e20 * B, rtol=1e-5, maxiter=500)
    assert not far.converged.any() and all("not finite" in reason for reason in far.reason)


def test_a_solve_that_goes_on_keeps_its_units(method):
    A, B = system(method is cg)
    P = torch.diag(1 / A.diagonal().abs())
    marks = []

    class Kept(Trail):
        def mark(self, mark):
            super().mark(mark)
            marks.append(mark)

    options = {"rtol": 1e-5, "maxiter": 500, "preconditioner": lambda r: 1e25 * (P @ r)}
    whole = method(lambda x: 1e-25 * (A @ x), 1e-10 * B, trail=Kept(), **options)
    again = method(lambda x: 1e-25 * (A @ x), 1e-10 * B, trail=Trail(marks[len(marks) // 2]), **options)
    assert whole.ok and torch.equal(whole.x, again.x) and torch.equal(whole.history, again.history)


def test_powers_are_exact_at_the_ends_of_the_range():
    x = torch.tensor([[1e-45, 3e38, 0.0, torch.inf, 1.0]])
    assert exponents(x).tolist() == [-149, 127, 0, 0, 0]
    near = scaled(x, -exponents(x))
    assert near[0, 0] == 1 and 1 <= near[0, 1] < 2
    assert torch.equal(scaled(near, exponents(x))[:, :3], x[:, :3])
    assert norms(torch.full((4, 1), 1e30)).item() == pytest.approx(2e30)

"""The Lanczos decomposition: A V = V T + Q B whatever happens to it, and a search that misses nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvalg.solve import SIDES, complete, grown, lanczos, orthonormalise, search, surpassed, unrivalled, wanted

F64 = torch.float64


def matrix(spectrum: torch.Tensor) -> torch.Tensor:
    n = len(spectrum)
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=F64)).Q
    return Q @ torch.diag(spectrum.double()) @ Q.T


def holds(krylov: lanczos.Krylov, A: torch.Tensor, tol: float = 1e-10) -> None:
    V, Q, basis = krylov.vectors, krylov.pending, krylov.basis
    L = basis[: krylov.locked]
    PAV = A @ V.T - L.T @ (L @ (A @ V.T))
    assert float((PAV - V.T @ krylov.projected - Q.T @ krylov.coupling).abs().max()) < tol
    assert float((basis @ basis.T - torch.eye(len(basis), dtype=basis.dtype)).abs().max()) < tol


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_decomposition_holds_through_growth_and_restarts(data):
    n, width = data.draw(st.integers(4, 20)), data.draw(st.integers(1, 3))
    values = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=n, max_size=n))
    A, d = matrix(torch.tensor(values)), data.draw(st.integers(0, 2))
    L = torch.linalg.qr(torch.randn(n, d, generator=torch.Generator().manual_seed(1), dtype=F64)).Q.T
    krylov = lanczos.begin(L.contiguous(), torch.zeros(0, n, dtype=F64), width, seed=0, capacity=n)
    for _ in range(12):
        if krylov.exhausted:
            break
        krylov = lanczos.extend(krylov, lambda x: A @ x - L.T @ (L @ (A @ x)), width, n)
        holds(krylov, A)
        if krylov.multiplied > 5 and data.draw(st.booleans()):
            pairs = lanczos.ritz(krylov)
            krylov = lanczos.compress(krylov, pairs.weights[:, -3:], n)
            holds(krylov, A)
    assert krylov.basis.shape[0] <= n


def test_estimates_are_the_residuals():
    A = matrix(torch.linspace(-1, 2, 30))
    krylov = lanczos.begin(torch.zeros(0, 30, dtype=F64), torch.zeros(0, 30, dtype=F64), 2, seed=0, capacity=30)
    for _ in range(6):
        krylov = lanczos.extend(krylov, lambda x: A @ x, 2, 30)
    pairs = lanczos.ritz(krylov)
    Y = krylov.vectors.T @ pairs.weights
    assert torch.allclose((A @ Y - Y * pairs.values).norm(dim=0), pairs.estimates, atol=1e-12)


def test_a_rebuilt_decomposition_knows_its_coupling():
    A = matrix(torch.linspace(-1, 2, 30))
    krylov = lanczos.begin(torch.zeros(0, 30, dtype=F64), torch.zeros(0, 30, dtype=F64), 2, seed=0, capacity=30)
    rows = torch.linalg.qr(torch.randn(30, 2, dtype=F64)).Q.T.contiguous()
    products = rows @ A
    remainder = products - products @ rows.T @ rows
    holds(lanczos.rebuild(krylov, rows, products, remainder, 2, 30), A)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rank_deficient_blocks(dtype):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(50, 4, generator=generator, dtype=dtype)).Q.T.contiguous()
    one, eps = torch.randn(1, 50, generator=generator, dtype=dtype), torch.finfo(dtype).eps
    block = torch.cat(
        [one, 2 * one + basis[:1], basis[1:2], 1e-3 * torch.randn(1, 50, generator=generator, dtype=dtype)]
    )
    directions, coefficients, coupling = orthonormalise(block, basis, 1.0)
    assert len(directions) == 2
    rebuilt = coefficients.to(dtype) @ basis + coupling.T.to(dtype) @ directions
    assert float((rebuilt - block).abs().max()) < 100 * eps
    both = torch.cat([basis, directions])
    assert float((both @ both.T - torch.eye(6, dtype=dtype)).abs().max()) < 10 * eps
    assert len(orthonormalise(torch.zeros_like(block), basis, 0.0)[0]) == 0
    assert len(orthonormalise(1e-9 * eps * block, basis, 1.0)[0]) == 0


def test_the_last_dimensions_can_be_drawn():
    basis = torch.linalg.qr(torch.randn(40, 38)).Q.T.contiguous()
    both = torch.cat([basis, complete(basis, 2, "0")])
    assert float((both @ both.T - torch.eye(40)).abs().max()) < 1e-5


def test_growing_leaves_what_was_there():
    first = grown(torch.zeros(0, 3), torch.ones(2, 3), 5)
    second = grown(first, 2 * torch.ones(2, 3), 5)
    assert second.data_ptr() == first.data_ptr() and bool((first == 1).all()) and second[2:].eq(2).all()
    third = grown(second, 3 * torch.ones(2, 3), 5)
    assert len(third) == 6 and bool((second[2:] == 2).all()) and bool((third[:2] == 1).all())


def test_steps_are_functions_of_the_state():
    A = matrix(torch.linspace(-1, 2, 40).pow(3))
    aim = search.Aim(k=4, which="LA", tol=1e-9, width=2, subspace=16, seed=3)
    states = [search.start(aim, torch.zeros(0, 40, dtype=F64), torch.zeros(0, 40, dtype=F64))]
    while not states[-1].over:
        states.append(search.step(states[-1], aim, lambda x: A @ x))
    for before, after in zip(states[::3], states[1::3], strict=False):
        again = search.step(before, aim, lambda x: A @ x)
        assert again.phase == after.phase and torch.equal(again.krylov.basis, after.krylov.basis)
        assert torch.equal(again.krylov.projected, after.krylov.projected)
    assert max(state.krylov.used() for state in states) <= aim.subspace


def test_ends_of_a_spectrum():
    values = torch.tensor([-3.0, -1.0, 0.0, 2.0, 2.5])
    assert {which: wanted(values, which, 3).tolist() for which in SIDES} == {
        "LA": [2, 3, 4],
        "SA": [0, 1, 2],
        "LM": [0, 3, 4],
        "BE": [0, 3, 4],
    }
    for which in SIDES:  # equal values: the two ends do not meet
        assert len(set(wanted(torch.ones(6), which, 6).tolist())) == 6


def test_comparisons_of_spectra():
    old, new = torch.tensor([2.0, 3.0]), torch.tensor([-4.0, 0.0, 2.05, 3.0])
    assert surpassed(old, new, "LA", 2, 0.01) and not surpassed(old, new, "LA", 2, 0.1)
    assert surpassed(old, new, "LM", 2, 0.1)
    assert unrivalled(new, torch.zeros(4), "LA", 2) and not unrivalled(new, torch.full((4,), 2.5), "LA", 2)


def test_long_float32_vectors_have_norm_one():
    rows = complete(torch.zeros(0, 4_000_000), 2, "0").double()
    assert float((rows @ rows.T - torch.eye(2).double()).abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_repeated_rows_of_a_block_are_one_direction(dtype):
    """Also where rows follow that have a part in the noise that a repeated row leaves."""
    draw = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=F64).sign().to(dtype)
    for order in ([0, 1, 1, 2], [0, 1, 2, 1, 0], [0, 0, 1, 1, 2]):
        block = draw[order]
        directions, _, coupling = orthonormalise(block, block[:0], 0.0)
        assert len(directions) == 3
        assert torch.allclose(coupling.T.to(dtype) @ directions, block, atol=1e-5)
        assert torch.allclose(directions @ directions.T, torch.eye(3, dtype=dtype), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e5, 1e12])
def test_wide_blocks_are_orthonormal_whatever_their_condition(condition, dtype):
    """By Cholesky factorisations where that is accurate, by Householder reflections elsewhere."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 20, generator=generator, dtype=F64)).Q for n in (20, 500))
    block = (left * torch.logspace(0, -torch.tensor(condition).log10(), 20, dtype=F64) @ right.T).to(dtype)
    eps = torch.finfo(dtype).eps
    directions, _, coupling = orthonormalise(block, block[:0], 0.0)
    assert len(directions) == 20 or condition * 10 * eps > 0.1
    assert float((directions @ directions.T - torch.eye(len(directions), dtype=dtype)).abs().max()) < 20 * eps
    assert float((coupling.T.to(dtype) @ directions - block).abs().max()) < 100 * eps

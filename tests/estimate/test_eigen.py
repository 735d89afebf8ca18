"""Eigenpairs: right, as often as they occur, with true residuals; exact where structure allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from curvalg import ConvergenceError, CurvalgWarning, Identity, Problem, registry
from curvalg.estimate import Eigenpairs, eigsh, svds
from tests.support.spectra import F64, SPECTRA, expected, matrix


def check(A, pairs: Eigenpairs, wanted: torch.Tensor, which: str, tol: float) -> None:
    n, k, (w, V) = len(A), len(wanted), pairs
    scale = float(torch.linalg.eigvalsh(A.double()).abs().max())
    found = w.abs().sort().values if which == "LM" else w
    assert w.shape == (k,) and V.shape == (n, k) and bool((w.diff() >= 0).all())
    assert (
        float((found - wanted).abs().max()) <= 2 * tol * scale + 10 * torch.finfo(V.dtype).eps * scale
    )  # among eigenvalues closer than tol, any may be found
    orthonormal = 1e-5 if V.dtype == torch.float32 else 1e-10
    assert float((V.T @ V - torch.eye(k, dtype=V.dtype)).abs().max()) <= orthonormal
    true = (A.double() @ V.double() - V.double() * w).norm(dim=0)
    assert float(true.max()) <= tol * scale * 1.01 + 10 * torch.finfo(V.dtype).eps * scale
    assert float((true - pairs.residuals).abs().max()) <= 20 * torch.finfo(V.dtype).eps * scale
    assert pairs.converged and not pairs.partial


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("block", [1, 3, "auto"])
def test_known_spectra(name, which, block):
    spectrum = SPECTRA[name]
    k = min(6, len(spectrum))
    wanted = expected(spectrum, which, k)
    for dtype, tol in ((F64, 1e-8), (torch.float32, 1e-4)):
        A = matrix(spectrum, dtype)
        check(A, eigsh(A, k, which=which, tol=tol, block=block), wanted, which, tol)


@pytest.mark.parametrize("which", ["LA", "BE"])
def test_restarts_of_a_small_subspace(which, inside):
    inside(lanczos_steps=20)
    for name in ("repeated", "indefinite", "low rank", "clustered"):
        A = matrix(SPECTRA[name])
        check(
            A,
            eigsh(A, 6, which=which, tol=1e-6, block=1, maxiter=20000),
            expected(SPECTRA[name], which, 6),
            which,
            1e-6,
        )


@pytest.mark.parametrize("name", SPECTRA)
def test_all_of_them(name):
    A, n = matrix(SPECTRA[name]), len(SPECTRA[name])
    check(A, eigsh(A, n, tol=1e-9), expected(SPECTRA[name], "LM", n), "LM", 1e-9)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_matrices(data):
    n = data.draw(st.integers(1, 30))
    values = data.draw(st.lists(st.integers(-4, 4), min_size=n, max_size=n))
    k, which = data.draw(st.integers(1, n)), data.draw(st.sampled_from(["LA", "SA", "LM", "BE"]))
    spectrum = torch.tensor(values, dtype=F64)
    A = matrix(spectrum, seed=data.draw(st.integers(0, 99)))
    pairs = eigsh(A, k, which=which, tol=1e-8, block=data.draw(st.integers(1, 4)), seed=data.draw(st.integers(0, 9)))
    check(A, pairs, expected(spectrum, which, k), which, 1e-7)


def test_a_repeated_eigenvalue_is_found_as_often_as_it_occurs_for_any_seed():
    A = matrix(SPECTRA["repeated"])
    for seed in range(20):
        w, _ = eigsh(A, 6, which="LA", tol=1e-4, block=1, seed=seed)
        assert torch.allclose(w, expected(SPECTRA["repeated"], "LA", 6), atol=1e-6), seed


def test_scipy_operators_and_arrays():
    A = matrix(SPECTRA["decaying"])
    wanted = expected(SPECTRA["decaying"], "LM", 4)
    single = A.numpy().astype(np.float32)
    bare = LinearOperator(A.shape, matvec=lambda x: A.numpy() @ x, dtype=float)
    for op in (A.numpy(), aslinearoperator(A.numpy()), bare, single):
        w, V = eigsh(op, 4, tol=1e-5)
        assert torch.allclose(w, wanted, atol=1e-6)
        assert V.dtype == (torch.float32 if op is single else F64)


def matrix_factorisation(a: int, b: int, r: int, su: float, sv: float) -> tuple[Problem, torch.Tensor]:
    """½‖UVᵀ − M‖² at an exact fit, and its Hessian's spectrum in closed form."""
    generator = torch.Generator().manual_seed(0)

    def orthonormal(n):
        return torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=F64)).Q

    params = {"U": su * orthonormal(a), "V": sv * orthonormal(b)}
    M = params["U"] @ params["V"].T
    problem = Problem(
        lambda p, x: (p["U"] @ p["V"].T).reshape(1, -1),
        torch.nn.MSELoss(reduction="sum"),
        (torch.zeros(1, 1, dtype=F64), M.reshape(1, -1)),
        params=params,
    )
    values = [su**2 + sv**2] * r**2 + [sv**2] * (r * (a - r)) + [su**2] * (r * (b - r)) + [0.0] * r**2
    return problem, 2 * torch.tensor(values, dtype=F64)


@pytest.mark.parametrize("direct", [True, False])
def test_matrix_factorisation_in_closed_form(direct, inside):
    if not direct:
        inside(small_eigenproblem=lambda *_: None)
    problem, spectrum = matrix_factorisation(6, 5, 2, 1.5, 0.5)
    op = registry.build("hessian").lower(problem)
    A = op.to_dense()
    for which, k in (("LA", 12), ("SA", 5), ("BE", 8), ("LM", len(spectrum))):
        pairs = eigsh(op, k, which=which, tol=1e-8)
        assert pairs.method == ("exact" if direct else "lanczos")
        check(A, pairs, expected(spectrum, which, k), which, 1e-8)


def test_residual_curvature_of_a_deep_linear_model(inside):
    """H − GGN of W₂W₁x has the eigenvalues ±σⱼ(Ω), each as often as there are hidden units."""
    inside(small_eigenproblem=lambda *_: None)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4, bias=False), torch.nn.Linear(4, 3, bias=False)).double()
    X, y = torch.randn(20, 5).double(), torch.randn(20, 3).double()
    problem = Problem(model, torch.nn.MSELoss(reduction="sum"), (X, y))
    sigma = torch.linalg.svdvals(2 * (model(X) - y).detach().T @ X)
    op = registry.build("residual").lower(problem)
    w, _ = eigsh(op, 8, which="BE", tol=1e-8, block=1)
    assert torch.allclose(w[-4:], sigma[0].expand(4), rtol=1e-7) and torch.allclose(
        w[:4], -sigma[0].expand(4), rtol=1e-7
    )


def small(columns: int = 30) -> Problem:
    torch.manual_seed(0)
    return Problem(
        torch.nn.Linear(columns, 3), torch.nn.CrossEntropyLoss(), (torch.randn(4, columns), torch.arange(4) % 3)
    )


def test_exact_where_the_structure_gives_it_rest_included():
    op = (registry.build("ggn") + 0.5 * Identity).lower(small())
    A, spectrum = op.to_dense(), torch.linalg.eigvalsh(op.to_dense().double())
    for which, k in (("LA", 3), ("LA", 20), ("SA", 4), ("BE", 6), ("LM", 93)):
        pairs = eigsh(op, k, which=which)
        assert pairs.method == "exact"
        check(A, pairs, expected(spectrum, which, k), which, 1e-5)


def test_a_dense_matrix_is_not_built_for_a_few_pairs(inside):
    net = torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))
    problem = Problem(net, torch.nn.CrossEntropyLoss(), (torch.randn(30, 20), torch.randint(0, 3, (30,))))
    op = registry.build("hessian").lower(problem)
    assert op.exact_rows() == problem.size > inside["cheap_exact"]
    few = eigsh(op, 2, which="LA", tol=1e-3)
    assert few.method == "lanczos" and few.products < 200
    assert eigsh(op, 150, which="LA", tol=1e-3).method == "exact"


def test_eigenvectors_by_parameter_names_and_a_plot():
    import matplotlib as mpl

    mpl.use("Agg")
    op = registry.build("ggn").lower(problem := small())
    pairs = eigsh(op, 3)
    assert {name: t.shape for name, t in pairs.unflatten(2).items()} == dict(problem.layout.shapes)
    assert torch.equal(problem.layout.flatten(pairs.unflatten(2)), pairs.eigenvectors[:, 2])
    ax = pairs.plot()
    assert ax.get_xlabel() == "rank" and len(ax.containers) == 1


def test_deflation_searches_the_complement():
    A, spectrum = matrix(SPECTRA["repeated"]), SPECTRA["repeated"]
    first = eigsh(A, 3, which="LA", tol=1e-10)
    for deflate in (first, first.eigenvectors, first.eigenvectors.numpy()):
        w, V = eigsh(A, 4, which="LA", tol=1e-8, deflate=deflate)
        assert torch.allclose(w, torch.tensor([spectrum.sort().values[-7], 4, 5, 5], dtype=F64), atol=1e-6)
        assert float((V.T @ first.eigenvectors).abs().max()) < 1e-9
    assert len(eigsh(A, 97, deflate=first, tol=1e-6)) == 97


@pytest.mark.parametrize("block", [1, 2])
def test_the_seed_of_the_search_that_found_what_is_deflated_may_be_used_again(block):
    A = matrix(SPECTRA["repeated"])
    for seed in range(3):
        first = eigsh(A, 3, which="LA", tol=1e-10, block=block, seed=seed)
        w, _ = eigsh(A, 4, which="LA", tol=1e-8, block=block, seed=seed, deflate=first)
        assert torch.allclose(w[-2:], torch.tensor([5.0, 5.0], dtype=F64))


def test_deflated_vectors_need_not_be_eigenvectors():
    A, generator = matrix(SPECTRA["repeated"]), torch.Generator().manual_seed(0)
    L = torch.randn(100, 3, generator=generator, dtype=F64) @ torch.rand(
        3, 4, generator=generator, dtype=F64
    )  # of rank 3
    Q = torch.linalg.qr(L[:, :3]).Q
    P = torch.eye(100, dtype=F64) - Q @ Q.T
    w, V = pairs = eigsh(A, 4, which="LA", tol=1e-8, deflate=L)
    assert torch.allclose(w, torch.linalg.eigvalsh(P @ A @ P)[-4:], atol=1e-7)
    assert torch.allclose((P @ A @ V - V * w).norm(dim=0), pairs.residuals, atol=1e-12)


def test_a_good_start_saves_products():
    A = matrix(SPECTRA["decaying"])
    plain = eigsh(A, 3, tol=1e-8, block=1)
    warm = eigsh(A, 3, tol=1e-8, block=1, v0=plain.eigenvectors)
    assert warm.products < plain.products - 5 and torch.allclose(warm.eigenvalues, plain.eigenvalues)
    op = registry.build("hessian").lower(problem := small(300))
    assert torch.allclose(
        eigsh(op, 2, v0=problem.layout.unflatten(torch.ones(problem.size))).eigenvalues,
        eigsh(op, 2).eigenvalues,
        rtol=1e-3,
    )


def test_seeds_decide_everything():
    A = matrix(SPECTRA["decaying"])
    first, again, other = (eigsh(A, 3, block=1, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.eigenvectors, again.eigenvectors) and not torch.equal(
        first.eigenvectors, other.eigenvectors
    )


def test_too_few_products_raise_with_the_pairs_so_far_or_warn():
    A = matrix(SPECTRA["indefinite"])
    with pytest.raises(
        ConvergenceError, match=r"of 6 eigenpairs of the 90 x 90 matrix reached tol=1e-08 in \d+ products; raise max"
    ) as caught:
        eigsh(A, 6, tol=1e-8, block=1, maxiter=30)
    pairs = caught.value.result
    true = (A @ pairs.eigenvectors - pairs.eigenvectors * pairs.eigenvalues).norm(dim=0)
    assert pairs.products == 30 + 6  # for residuals
    assert not pairs.converged and len(pairs) == 6 and torch.allclose(true, pairs.residuals)
    with pytest.warns(CurvalgWarning, match="raise maxiter"):
        assert not eigsh(A, 6, tol=1e-8, block=1, maxiter=30, on_fail="warn").converged


def test_a_tolerance_below_the_noise_is_said_to_be_out_of_reach():
    A = matrix(SPECTRA["indefinite"], torch.float32)
    with pytest.raises(ConvergenceError, match="below the noise of the products"):
        eigsh(A, 4, tol=1e-9, maxiter=20000)


def test_zero_tolerance_means_rounding():
    A = matrix(SPECTRA["decaying"])
    check(A, eigsh(A, 4, tol=0), expected(SPECTRA["decaying"], "LM", 4), "LM", 1e-13)


@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (7, 7)])
def test_singular_triplets(shape):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(*shape, generator=generator, dtype=F64)
    A[:, 0] = A[:, 1]
    k = min(shape)
    U, s, V = triplets = svds(A, k, tol=1e-10)
    reference = torch.linalg.svdvals(A).flip(0)
    assert torch.allclose(s, reference, atol=1e-6)
    for Q in (U, V):
        assert float((Q.T @ Q - torch.eye(k, dtype=F64)).abs().max()) < 1e-8
    assert torch.allclose(U @ torch.diag(s) @ V.T, A, atol=1e-6) and float(triplets.residuals.max()) < 1e-6


def test_singular_values_of_a_jacobian():
    op = registry.build("jacobian").lower(small())
    reference = torch.linalg.svdvals(op.to_dense())
    _, s, _ = svds(op, 3)
    assert torch.allclose(s.float(), reference[:3].flip(0), rtol=1e-4)


@pytest.mark.parametrize(("each", "width"), [(0.0, 4), (1.0, 1), (0.45, 2)])
def test_the_block_is_as_wide_as_pays(each, width, inside):
    """A product of b columns takes 1 + each · (b − 1) seconds; 0.45 pays for two columns, and not for four."""
    now = [0.0]

    def product(x):
        now[0] += 1e-3 * (1 + each * (x.shape[1] - 1))
        return x

    assert inside["choose_width"](product, torch.ones(3, 1), 4, clock=lambda: now[0]) == width


def test_long_products_are_not_widened_by_trial(inside):
    now, widths = [0.0], []

    def product(x):
        now[0] += 0.02
        widths.append(x.shape[1])
        return x

    assert inside["choose_width"](product, torch.ones(3, 1), 4, clock=lambda: now[0]) == 1
    assert set(widths) == {1}

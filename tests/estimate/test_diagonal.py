"""Diagonals: no bias, errors that cover entry by entry, tolerances, exact routes and refusals."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator

from curvalg import (
    CheckpointError,
    ConvergenceError,
    CurvalgWarning,
    Diagonal,
    ExpressionError,
    FactsError,
    registry,
)
from curvalg.estimate import diagonal
from tests.support.spectra import F64, matrix

n = 200
i = torch.arange(n, dtype=F64)
SPECTRA = {
    ".85^i": 0.85**i,
    "i^-2": (i + 1) ** -2,
    "i^-1": 1 / (i + 1),
    "30 ones": torch.cat([torch.ones(30, dtype=F64), torch.full((n - 30,), 1e-3, dtype=F64)]),
    "flat": torch.linspace(1, 3, n, dtype=F64),
    "indefinite": torch.linspace(-1, 2, n, dtype=F64) ** 3,
}
METHODS = ("hutchinson", "xdiag")


@functools.cache
def runs(spectrum: str, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Deviations and reported errors, (seeds, n)."""
    A = matrix(SPECTRA[spectrum])
    found = [diagonal(A, method=method, seed=seed) for seed in range(20)]
    return torch.stack([e.value - A.diagonal() for e in found]), torch.stack([e.error for e in found])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_two_reported_errors_cover_and_are_not_too_large(spectrum, method):
    deviations, errors = runs(spectrum, method)
    rmse = float(deviations.square().mean().sqrt())
    assert float((deviations.abs() <= 2 * errors).double().mean()) >= 0.85
    assert float(errors.square().mean().sqrt()) <= 3 * rmse


def test_the_basis_pays_where_eigenvalues_decay():
    for spectrum, factor in ((".85^i", 10), ("i^-2", 10), ("i^-1", 1)):
        plain, better = (float(runs(spectrum, method)[0].square().mean()) ** 0.5 for method in METHODS)
        assert factor * better < plain


GENERAL = matrix(SPECTRA["indefinite"]) + torch.triu(torch.ones(n, n, dtype=F64)) / 30


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("A", [matrix(SPECTRA["indefinite"]), GENERAL], ids=["indefinite", "general"])
def test_there_is_no_bias(method, A):
    values = torch.stack([diagonal(A, products=24, method=method, seed=s).value for s in range(60)])
    scores = (values.mean(0) - A.diagonal()) / (values.std(0) / 60**0.5)
    assert float(scores.abs().max()) <= 5  # the largest of 200
    assert float(scores.square().mean()) <= 1.5


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("method", ["auto", "exact", "xdiag"])
@pytest.mark.parametrize(
    "spectrum", [[2.0], [2.0, -1.0], [1.0] * 5, [0.0] * 40, [3.0, 2.0, -1.0] + [0.0] * 77], ids=len
)
def test_small_and_degenerate_operators(spectrum, method, dtype):
    A = matrix(torch.tensor(spectrum, dtype=F64), dtype)
    estimate = diagonal(A, products=80 if method == "exact" else 60, method=method)
    assert estimate.value.dtype == F64 and estimate.value.shape == estimate.error.shape == (len(A),)
    deviations = (estimate.value - A.diagonal()).abs()
    if method != "xdiag" or len(A) >= 40:
        assert float(deviations.max()) <= 150 * torch.finfo(dtype).eps and float(estimate.error.max()) <= 1e-4
    assert bool((deviations <= 5 * estimate.error + 1e-5).all())  # signs of few entries repeat themselves


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("A", [matrix(SPECTRA["i^-1"]), GENERAL], ids=["symmetric", "general"])
def test_tolerances_are_reached(method, A):
    good = 0
    for seed in range(10):
        estimate = diagonal(A, products=12, tol=0.2, method=method, seed=seed)
        assert estimate.converged and estimate.error.norm() <= 0.2 * estimate.value.norm()
        good += bool((estimate.value - A.diagonal()).norm() <= 2 * 0.2 * A.diagonal().norm())
    assert good >= 9
    exact = diagonal(A, products=30, tol=1e-9, method=method)
    assert exact.method == "exact" and float((exact.value - A.diagonal()).abs().max()) < 1e-11
    assert exact.products <= 2 * n


def test_a_tolerance_out_of_reach():
    A = matrix(SPECTRA["flat"])
    with pytest.raises(
        ConvergenceError, match="the diagonal of the 200 x 200 matrix has a standard error of"
    ) as caught:
        diagonal(A, products=20, tol=1e-6, maxiter=40)
    with pytest.warns(CurvalgWarning, match="raise tol= or maxiter="):
        estimate = diagonal(A, products=20, tol=1e-6, maxiter=40, on_fail="warn")
    assert torch.equal(caught.value.result.value, estimate.value) and not estimate.converged


@pytest.mark.parametrize("term", ["hessian", "ggn"])
def test_models_against_dense_matrices(term, problem_of, dense_of):
    op = registry.build(term).lower(problem_of("cnn"))
    true = getattr(dense_of("cnn"), term).diagonal()
    for method in METHODS:
        estimate = diagonal(op, products=24, method=method)
        inside = (estimate.value - true).abs() <= 4 * estimate.error + 1e-12
        assert float(inside.double().mean()) >= 0.9 and estimate.method == method


def test_structure_gives_it_for_nothing(problem_of):
    problem = problem_of("mlp")
    for op in (registry.build("kfac").lower(problem), Diagonal(torch.arange(problem.size).double()).lower(problem)):
        estimate = diagonal(op)
        assert (estimate.method, estimate.products, float(estimate.error.max())) == ("exact", 0, 0.0)
        assert torch.allclose(estimate.value, op.to_dense().diagonal(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tol", [None, 1e-9])
def test_resumed_runs_give_the_same_bits(tmp_path, inside, method, tol):
    inside(widest_sketch=7)
    A, path, blocks = matrix(SPECTRA["i^-1"]), tmp_path / "run.safetensors", [0, 0]

    def product(x):
        blocks[0] += 1
        if blocks[0] == blocks[1]:
            raise KeyboardInterrupt
        return A.numpy() @ x

    op = LinearOperator((n, n), matvec=product, matmat=product, rmatvec=product, rmatmat=product, dtype=float)
    whole = diagonal(op, method=method, tol=tol)
    for at in (3, 5, blocks[0] - 1):
        path.unlink(missing_ok=True)
        blocks[:] = 0, at
        partial = diagonal(op, method=method, tol=tol, checkpoint=path)
        assert partial.partial and 0 < partial.products < whole.products
        blocks[:] = 0, 0
        resumed = diagonal(op, method=method, tol=tol, checkpoint=path)
        assert torch.equal(resumed.value, whole.value) and torch.equal(resumed.error, whole.error)
    with pytest.raises(CheckpointError, match="option seed differs"):
        diagonal(op, method=method, tol=tol, checkpoint=path, seed=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "xtrace"}, "expected method to be one of 'auto', 'exact', 'hutchinson', 'xdiag', got 'xtrace'"),
        ({"products": 3}, "expected products ≥ 4 for method 'xdiag'"),
        ({"method": "exact"}, "expected products ≥ 200 for method 'exact'"),
        ({"tol": -1}, "expected a relative tolerance"),
        ({"seed": "0"}, "expected seed to be an integer"),
    ],
)
def test_arguments_that_make_no_sense(options, message):
    with pytest.raises(ExpressionError, match=re.escape(message)):
        diagonal(matrix(SPECTRA["flat"]), **options)


def test_operators_that_do_not_do(problem_of):
    with pytest.raises(FactsError, match="expected a square operator for its diagonal, but jacobian is"):
        diagonal(registry.build("jacobian").lower(problem_of("mlp")))
    op = LinearOperator((n, n), matvec=lambda x: x, matmat=lambda x: x, dtype=np.float64)
    with pytest.raises(
        FactsError,
        match=r"expected products with the transpose, but .* define its rmatvec .*, or use method='hutchinson'",
    ):
        diagonal(op)
    assert torch.equal(diagonal(op, method="hutchinson").value, torch.ones(n, dtype=F64))

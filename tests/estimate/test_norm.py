"""Norms: against dense matrices, errors that cover, rectangular operators and refusals."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator

from curvalg import CheckpointError, ConvergenceError, ExpressionError, FactsError, Identity, registry
from curvalg.estimate import norm, trace
from tests.support.spectra import F64, matrix

n = 250
i = torch.arange(n, dtype=F64)
SPECTRA = {
    ".95^i": 0.95**i,
    "i^-1": 1 / (i + 1),
    "30 ones": torch.cat([torch.ones(30, dtype=F64), torch.full((n - 30,), 1e-3, dtype=F64)]),
    "flat": torch.linspace(1, 3, n, dtype=F64),
    "indefinite": torch.linspace(-1, 2, n, dtype=F64) ** 3,
}
WIDE = torch.randn(80, 200, generator=torch.Generator().manual_seed(0), dtype=F64) * torch.logspace(
    0, -2, 200, dtype=F64
)
METHODS = ("hutchinson", "xnystrace")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_two_reported_errors_cover_and_are_not_too_large(spectrum, method):
    A, found = matrix(SPECTRA[spectrum]), []
    for seed in range(30):
        estimate = norm(A, method=method, seed=seed)
        assert estimate.products == 60 and estimate.method == method
        found.append((estimate.value - float(A.norm()), estimate.error))
    deviations, errors = torch.tensor(found, dtype=F64).T
    assert float((deviations.abs() <= 2 * errors).double().mean()) >= 0.85
    assert float(errors.median()) <= 3 * float(deviations.square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("A", [WIDE, WIDE.T], ids=["wide", "tall"])
@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_rectangular_operators(A, dtype, method):
    estimate = norm(A.to(dtype), method=method)
    assert abs(estimate.value - float(A.norm())) <= 4 * estimate.error
    spectral = norm(A.to(dtype), 2)
    assert spectral.value == pytest.approx(float(torch.linalg.matrix_norm(A, 2)), rel=1e-4)


def test_operators_without_a_transpose():
    op = LinearOperator((80, 200), matvec=lambda x: WIDE.numpy() @ x, dtype=float)
    estimate = norm(op)
    assert estimate.method == "hutchinson" and abs(estimate.value - float(WIDE.norm())) <= 4 * estimate.error


@pytest.mark.parametrize("values", [[2.0], [2.0, -1.0], [1.0] * 5, [0.0] * 70, [3.0, -2.0] + [0.0] * 78], ids=len)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_small_and_degenerate_operators(values, dtype):
    A = matrix(torch.tensor(values, dtype=F64), dtype)
    for method in ("auto", "xnystrace"):
        estimate = norm(A, method=method)
        assert estimate.value == pytest.approx(float(A.double().norm()), rel=100 * torch.finfo(dtype).eps, abs=1e-12)
        assert estimate.error <= 1e-3
    exact = norm(A, method="exact", products=80)
    assert exact.value == pytest.approx(float(A.double().norm()), rel=1e-6) and exact.error == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_tolerances_are_reached(method):
    A, good = matrix(SPECTRA[".95^i"]), 0
    for seed in range(10):
        estimate = norm(A, products=12, tol=0.02, method=method, seed=seed, maxiter=1000)
        assert estimate.converged and estimate.error <= 0.02 * estimate.value * (1 + 1e-9)
        good += abs(estimate.value - float(A.norm())) <= 2 * 0.02 * float(A.norm())
    assert good >= 9
    with pytest.raises(ConvergenceError) as caught:
        norm(A, products=12, tol=1e-9, maxiter=12)
    assert abs(caught.value.result.value - float(A.norm())) <= 4 * caught.value.result.error
    exact = norm(A, products=12, tol=1e-9, maxiter=2000, method=method)
    assert exact.method == "exact" and exact.value == pytest.approx(float(A.norm()), rel=1e-12)


def test_models_against_dense_matrices(problem_of, dense_of):
    problem, dense = problem_of("cnn"), dense_of("cnn")
    for term in ("hessian", "ggn", "jacobian"):
        op, true = registry.build(term).lower(problem), op_dense(registry.build(term).lower(problem))
        estimate = norm(op, products=20)
        assert abs(estimate.value - float(true.norm())) <= 4 * estimate.error + 1e-9
        assert norm(op, "spectral").value == pytest.approx(float(torch.linalg.matrix_norm(true, 2)), rel=1e-3)
    nuclear = norm(registry.build("ggn").lower(problem), "nuclear")
    assert nuclear.value == trace(registry.build("ggn").lower(problem)).value
    assert abs(nuclear.value - float(dense.ggn.trace())) <= 4 * nuclear.error + 1e-9


def op_dense(op) -> torch.Tensor:
    return torch.as_tensor(op @ np.eye(op.shape[1]))


def test_structure_gives_it_for_nothing(problem_of):
    op = (registry.build("kfac") + 1e-2 * Identity).lower(problem_of("mlp"))
    estimate = norm(op)
    assert (estimate.method, estimate.products, estimate.error) == ("exact", 0, 0.0)
    assert estimate.value == pytest.approx(float(op.to_dense().norm()), rel=1e-9)


def test_resumed_runs_give_the_same_bits(tmp_path, inside):
    inside(widest_sketch=7)
    A, path, blocks = matrix(SPECTRA["i^-1"]), tmp_path / "run.safetensors", [0, 0]

    def product(x):
        blocks[0] += 1
        if blocks[0] == blocks[1]:
            raise KeyboardInterrupt
        return A.numpy() @ x

    op = LinearOperator((n, n), matvec=product, matmat=product, rmatvec=product, rmatmat=product, dtype=float)
    whole = norm(op)
    blocks[:] = 0, 4
    assert norm(op, checkpoint=path).partial
    blocks[:] = 0, 0
    resumed = norm(op, checkpoint=path)
    assert (resumed.value, resumed.error, resumed.products) == (whole.value, whole.error, whole.products)
    with pytest.raises(CheckpointError, match=r"matrix differs.*quantity differs"):
        trace(op, checkpoint=path)


@pytest.mark.parametrize(
    ("ord", "options", "message"),
    [
        (1, {}, "expected ord to be one of 'fro', 'spectral', 'nuclear', 2, got 1"),
        ("frobenius", {}, "expected ord to be one of"),
        (None, {}, "expected ord to be one of"),
        ([2], {}, "expected ord to be one of"),
        (True, {}, "expected ord to be one of"),
        ("fro", {"method": "xtrace"}, "expected method to be one of 'auto', 'exact', 'hutchinson', 'xnystrace', got 'xtrace'"),
        ("fro", {"method": "xnystrace", "products": 3}, "expected products ≥ 4"),
        ("fro", {"tol": 2.0}, "expected a relative tolerance"),
        (2, {"method": "xtrace"}, "expected method='auto' for the spectral norm"),
        (2, {"seed": 1.5}, "expected seed to be an integer"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense(ord, options, message):
    with pytest.raises(ExpressionError, match=re.escape(message)):
        norm(matrix(SPECTRA["flat"]), ord, **options)


def test_nuclear_norms_need_proof(problem_of):
    for op in (registry.build("hessian").lower(problem_of("mlp")), matrix(SPECTRA["flat"])):
        with pytest.raises(
            FactsError, match=r"the fact psd is not proved for .*; the nuclear norm is the trace of such"
        ):
            norm(op, "nuclear")


def test_products_of_the_spectral_norm_are_bounded():
    with pytest.raises(ConvergenceError) as caught:
        norm(matrix(SPECTRA["indefinite"]), 2, products=12, tol=1e-8)
    assert caught.value.result.products <= 30 and not caught.value.result.converged


def test_a_tolerance_is_of_the_norm_not_of_its_square():
    A = matrix(SPECTRA[".95^i"])
    first = norm(A, products=12)
    for factor, products in ((1.1, 12), (0.9, 24)):
        tol = factor * first.error / first.value
        assert norm(A, products=12, tol=tol).products >= products
        assert (norm(A, products=12, tol=tol).products == 12) == (products == 12)

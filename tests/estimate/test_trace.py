"""Traces: the published ranking, no bias, errors that cover, tolerances, exact routes and refusals."""

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
    Identity,
    Problem,
    ProblemError,
    VectorError,
    registry,
)
from curvalg.estimate import trace
from tests.support.spectra import F64, matrix

n, PRODUCTS = 300, 60
SEEDS = range(30)
i = torch.arange(n, dtype=F64)
SPECTRA = {
    ".85^i": 0.85**i,
    "i^-2": (i + 1) ** -2,
    "i^-1": 1 / (i + 1),
    "30 ones": torch.cat([torch.ones(30, dtype=F64), torch.full((n - 30,), 1e-3, dtype=F64)]),
    "flat": torch.linspace(1, 3, n, dtype=F64),
}
METHODS = ("hutchinson", "hutch++", "xtrace", "xnystrace")
TABLE = {
    ".85^i": (6e-2, 8e-3, 2e-3, 2e-4),
    "i^-2": (1e-1, 2e-3, 9e-4, 9e-4),
    "i^-1": (4e-2, 1e-2, 7e-3, 8e-3),
    "30 ones": (3e-2, 4e-2, 2e-2, 7e-4),
    "flat": (3.5e-3, 9e-3, 5e-3, 3e-3),
}


@functools.cache
def basis(seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=F64)).Q


@functools.cache
def runs(spectrum: str, method: str, dtype: torch.dtype = F64) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative errors over seeds, true and reported. Never in the unit basis, where signs would be exact by accident."""
    values, true = SPECTRA[spectrum], float(SPECTRA[spectrum].sum())
    found = []
    for seed in SEEDS:
        Q = basis(seed)
        estimate = trace(((Q * values) @ Q.T).to(dtype), products=PRODUCTS, method=method, seed=seed)
        assert estimate.products == PRODUCTS and estimate.method == method and estimate.converged
        found.append((estimate.value / true - 1, estimate.error / true))
    deviations, errors = torch.tensor(found, dtype=F64).T
    return deviations, errors


def rmse(spectrum: str, method: str) -> float:
    return float(runs(spectrum, method)[0].square().mean().sqrt())


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_errors_are_those_of_the_literature_and_so_is_the_ranking(spectrum):
    own = [rmse(spectrum, method) for method in METHODS]
    for found, published in zip(own, TABLE[spectrum], strict=True):
        assert published / 3 <= found <= 3 * published
    best = TABLE[spectrum].index(min(TABLE[spectrum]))
    assert own[best] <= 1.5 * min(own)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_two_reported_errors_cover_and_are_not_too_large(spectrum, method):
    deviations, errors = runs(spectrum, method)
    assert float((deviations.abs() <= 2 * errors).double().mean()) >= 0.85
    assert float(errors.median()) <= 3 * rmse(spectrum, method)


@pytest.mark.parametrize("method", METHODS)
def test_single_precision_is_as_good(method):
    for spectrum in (".85^i", "30 ones"):
        double, single = runs(spectrum, method)[0], runs(spectrum, method, torch.float32)[0]
        assert float((double - single).abs().max()) < 2e-5


SIGNED = torch.linspace(-1, 2, 120, dtype=F64) ** 3
GENERAL = matrix(SIGNED) + torch.triu(torch.ones(120, 120, dtype=F64)) / 30


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("A", [matrix(SIGNED), GENERAL, matrix(SIGNED.abs())], ids=["indefinite", "general", "psd"])
def test_there_is_no_bias(method, A):
    if method == "xnystrace" and A is not None and float(torch.linalg.eigvalsh((A + A.T) / 2)[0]) < -1e-9:
        pytest.skip("for positive semi-definite operators")
    values = torch.tensor([trace(A, products=24, method=method, seed=s).value for s in range(60)], dtype=F64)
    assert abs(float(values.mean() - A.trace())) <= 4 * float(values.std()) / 60**0.5


SMALL = {
    "1 x 1": torch.tensor([2.0], dtype=F64),
    "2 x 2": torch.tensor([2.0, 1.0], dtype=F64),
    "identity": torch.ones(5, dtype=F64),
    "zero": torch.zeros(40, dtype=F64),
    "low rank": torch.cat([torch.tensor([3.0, 2.0, 1.0], dtype=F64), torch.zeros(77, dtype=F64)]),
    "indefinite low rank": torch.cat([torch.tensor([3.0, -2.0, -1.0], dtype=F64), torch.zeros(77, dtype=F64)]),
    "identity of 90 rows": torch.ones(90, dtype=F64),
}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("method", ["auto", "exact", *METHODS])
@pytest.mark.parametrize("name", SMALL)
def test_small_and_degenerate_operators(name, method, dtype):
    if method == "xnystrace" and name.startswith("indefinite"):
        pytest.skip("for positive semi-definite operators")
    spectrum = SMALL[name]
    A = matrix(spectrum, dtype)
    estimate = trace(A, products=100 if method == "exact" else 60, method=method)
    deviation = abs(estimate.value - float(A.double().trace()))
    low_rank = name not in ("2 x 2",) and not (
        method == "hutchinson" and name not in ("identity of 90 rows", "identity", "1 x 1", "zero")
    )
    if low_rank:  # nothing is left to chance
        assert deviation <= 200 * torch.finfo(dtype).eps * float(spectrum.abs().sum())
    assert deviation <= 4 * estimate.error + 1e-6
    assert estimate.error >= 0 and np.isfinite(estimate.error)
    assert estimate.products <= 100


def test_the_error_covers_in_low_rank_too():
    A = matrix(torch.cat([torch.logspace(0, -3, 12, dtype=F64), torch.zeros(188, dtype=F64)]), torch.float32)
    for method in ("hutch++", "xtrace", "xnystrace"):
        good = [
            abs(e.value - float(A.double().trace())) <= 2 * e.error <= 1e-3
            for e in (trace(A, method=method, seed=s) for s in range(10))
        ]
        assert sum(good) >= 9, method


@pytest.mark.parametrize("method", METHODS)
def test_tolerances_are_reached_and_products_used_again(method):
    A, count = matrix(1 / (i + 1)), [0]

    def product(x):
        count[0] += x.shape[1]
        return A.numpy() @ x

    op = LinearOperator((n, n), matvec=product, matmat=product, dtype=float)
    true, good = float(A.trace()), 0
    for seed in range(100):
        count[0] = 0
        estimate = trace(op, products=12, tol=5e-3, method=method, seed=seed, maxiter=1000)
        assert estimate.converged and estimate.error <= 5e-3 * abs(estimate.value) and estimate.products == count[0]
        assert estimate.products <= n or (method == "hutchinson" and estimate.products <= 2 * n)
        if estimate.method != "exact":
            fresh = trace(A, products=estimate.products, method=method, seed=seed)  # the same bits, but for blocks
            assert abs(fresh.value - estimate.value) <= 1e-9 * abs(fresh.value)
        good += abs(estimate.value - true) <= 2 * 5e-3 * true
    assert good >= 90


def test_the_last_resort_is_exact():
    A = matrix(torch.linspace(1, 3, n, dtype=F64))
    for method in METHODS:
        for dtype in (torch.float32, F64):
            estimate = trace(A.to(dtype), tol=1e-9, method=method, products=40)
            assert estimate.method == "exact" and estimate.error == 0.0 and estimate.converged
            assert abs(estimate.value - float(A.trace())) <= (2e-6 if dtype != F64 else 1e-12) * float(A.trace())
            assert estimate.products <= (n if method != "hutchinson" else 2 * n)


def test_a_tolerance_out_of_reach_raises_with_the_estimate_or_warns():
    A = matrix(SPECTRA["flat"])
    with pytest.raises(
        ConvergenceError, match=r"standard error of .* after 40 products, more than tol=1e-06; raise"
    ) as caught:
        trace(A, products=20, tol=1e-6, maxiter=40)
    with pytest.warns(CurvalgWarning, match="more than tol=1e-06"):
        estimate = trace(A, products=20, tol=1e-6, maxiter=40, on_fail="warn")
    assert not estimate.converged and estimate.products == 40 and caught.value.result.value == estimate.value
    assert estimate.value == pytest.approx(trace(A, products=40).value, rel=1e-12)


def test_seeds_decide_everything():
    A = matrix(SPECTRA["i^-1"])
    for method in METHODS:
        assert trace(A, method=method).value == trace(A, method=method).value != trace(A, method=method, seed=1).value


# -- operators of models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention_softmax"])
@pytest.mark.parametrize("term", ["hessian", "ggn"])
def test_models_against_dense_matrices(name, term, problem_of, dense_of):
    op = registry.build(term).lower(problem_of(name))
    true = float(getattr(dense_of(name), term).trace())
    products = min(24, op.shape[0] - 1)
    estimate = trace(op, products=products)
    if estimate.method == "exact":
        assert abs(estimate.value - true) <= 1e-9 * abs(true)
    for method in ("hutchinson", "xtrace") + (("xnystrace",) if term == "ggn" else ()):
        estimate = trace(op, products=products, method=method)
        assert abs(estimate.value - true) <= 4 * estimate.error and estimate.method == method


def test_what_is_proved_chooses_the_method(problem_of):
    problem = problem_of("cnn")
    assert trace(registry.build("hessian").lower(problem), products=10).method == "xtrace"
    squared = registry.build("hessian").T @ registry.build("hessian")
    assert trace(squared.lower(problem), products=10).method == "xnystrace"
    assert trace(registry.build("ggn").lower(problem), products=10).method == "exact"


def test_structure_gives_it_for_nothing(problem_of, dense_of):
    problem = problem_of("mlp")
    for op in (registry.build("kfac").lower(problem), Diagonal(torch.arange(problem.size).double()).lower(problem)):
        estimate = trace(op)
        assert (estimate.method, estimate.products, estimate.error) == ("exact", 0, 0.0)
        assert abs(estimate.value - float(op.to_dense().trace())) <= 1e-9 * abs(estimate.value)
    for terms, columns in (("ggn", 2), ("covariance", 1)):  # squares of the columns of each row are summed
        found = trace((2 * registry.build(terms) + 0.1 * Identity).lower(problem), products=30)
        assert (found.method, found.products) == ("exact", columns)
        expected = 2 * float(getattr(dense_of("mlp"), terms).trace()) + 0.1 * problem.size
        assert abs(found.value - expected) <= 1e-9 * found.value


def test_operators_between_outputs(problem_of):
    op = registry.build("loss_hessian").lower(problem_of("mlp"))
    estimate = trace(op, products=8)
    assert abs(estimate.value - float(op.to_dense().trace())) <= 4 * estimate.error


# -- interruption and checkpoints ---------------------------------------------------------------------------------------


class Interrupted:
    """A product that is interrupted once, at some block."""

    def __init__(self, A: torch.Tensor, at: int) -> None:
        self.A, self.at, self.blocks = A.numpy(), at, 0

    def __call__(self, x):
        self.blocks += 1
        if self.blocks == self.at:
            raise KeyboardInterrupt
        return self.A @ x

    @property
    def op(self):
        return LinearOperator(self.A.shape, matvec=self, matmat=self, rmatmat=self, rmatvec=self, dtype=float)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tol", [None, 1e-9])
def test_resumed_runs_give_the_same_bits(tmp_path, inside, method, tol):
    inside(widest_sketch=7)
    A, path = matrix(SPECTRA["i^-1"]), tmp_path / "run.safetensors"
    whole = trace((plain := Interrupted(A, 0)).op, method=method, tol=tol)
    for at in (3, 5, plain.blocks - 1):
        path.unlink(missing_ok=True)
        partial = trace(Interrupted(A, at).op, method=method, tol=tol, checkpoint=path)
        assert partial.partial and not partial.converged and 0 < partial.products < whole.products
        resumed = trace((rest := Interrupted(A, 0)).op, method=method, tol=tol, checkpoint=path)
        assert (resumed.value, resumed.error, resumed.products) == (whole.value, whole.error, whole.products)
        assert rest.blocks < plain.blocks and resumed.converged and not resumed.partial


def test_a_finished_run_costs_nothing(tmp_path):
    A, path = matrix(SPECTRA["i^-1"]), tmp_path / "run.safetensors"
    first = trace(Interrupted(A, 0).op, checkpoint=path)
    again = trace(Interrupted(A, 1).op, checkpoint=path)
    assert (first.value, first.error) == (again.value, again.error)


def test_an_interruption_before_anything_is_an_interruption():
    with pytest.raises(KeyboardInterrupt):
        trace(Interrupted(matrix(SPECTRA["i^-1"]), 1).op)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "option seed differs"),
        ({"products": 40}, "option products differs"),
        ({"tol": 0.1}, "option tol differs"),
        ({"method": "hutchinson"}, r'algorithm differs \(stored: "xtrace", asked: "hutchinson"\)'),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(tmp_path, options, message):
    A, path = matrix(SPECTRA["i^-1"]), tmp_path / "run.safetensors"
    trace(A, method="xtrace", checkpoint=path)
    with pytest.raises(CheckpointError, match=message):
        trace(A, **{"method": "xtrace", "checkpoint": path, **options})
    assert path.exists()


# -- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"products": 1}, "expected products ≥ 2 for method 'hutchinson' (two test vectors, to estimate the error), got products=1"),
        ({"products": 3, "method": "xtrace"}, "expected products ≥ 4"),
        ({"products": 1, "method": "hutchinson"}, "expected products ≥ 2"),
        ({"products": 5, "method": "hutch++"}, "expected products ≥ 6"),
        ({"method": "exact"}, "expected products ≥ 300 for method 'exact'"),
        ({"products": 0}, "expected products to be an integer ≥ 1, got 0"),
        ({"products": 6.0}, "expected products to be an integer"),
        ({"products": True}, "expected products to be an integer"),
        ({"method": "girard"}, "expected method to be one of 'auto', 'exact', 'hutchinson', 'hutch++', 'xtrace', 'xnystrace', got 'girard'"),
        ({"method": None}, "expected method to be one of"),
        ({"tol": 0.0}, "expected a relative tolerance 0 < tol < 1, or None"),
        ({"tol": "small"}, "expected a relative tolerance"),
        ({"tol": float("nan")}, "expected a relative tolerance"),
        ({"tol": True}, "expected a relative tolerance"),
        ({"seed": 0.5}, "expected seed to be an integer, got 0.5"),
        ({"seed": None}, "expected seed to be an integer"),
        ({"maxiter": 30}, "expected maxiter to be a number of products ≥ 60"),
        ({"on_fail": "ignore"}, "expected on_fail to be 'raise' or 'warn', got 'ignore'"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense(options, message):
    with pytest.raises(ExpressionError, match=re.escape(message)):
        trace(matrix(SPECTRA["flat"]), **options)


def test_operators_without_a_trace(problem_of):
    with pytest.raises(
        FactsError, match=r"expected a square operator for its trace, but jacobian is 21 x \d+; take that of"
    ):
        trace(registry.build("jacobian").lower(problem_of("mlp")))
    with pytest.raises(ExpressionError, match=r"an expression becomes an operator by expr.lower\(problem\)"):
        trace(registry.build("hessian"))


def test_nystrom_needs_proof_or_at_least_no_disproof(problem_of):
    op = registry.build("hessian").lower(problem_of("cnn"))
    with pytest.raises(FactsError, match="the fact psd is not proved for hessian; use method='xtrace'"):
        trace(op, products=10, method="xnystrace")
    with pytest.raises(
        FactsError, match=r"expected a positive semi-definite operator, but ωᵀAω < 0 .* use method='xtrace'"
    ):
        trace(matrix(SIGNED), method="xnystrace", products=40)


def test_products_that_are_not_finite():
    def product(x):
        return np.full_like(x, np.nan)

    op = LinearOperator((n, n), matvec=product, matmat=product, dtype=float)
    for method in METHODS:
        with pytest.raises((ProblemError, VectorError), match="expected finite products"):
            trace(op, method=method)


@pytest.mark.parametrize("products", [2, 3])
def test_few_products_are_taken_by_what_they_suffice_for(products):
    """And the result says what that was."""
    torch.manual_seed(0)
    net = torch.nn.Linear(5, 3).double()
    problem = Problem(net, torch.nn.CrossEntropyLoss(), (torch.randn(20, 5).double(), torch.arange(20) % 3))
    op = registry.build("hessian").lower(problem)
    found = trace(op, products=products)
    assert found.method == "hutchinson" and found.products == products
    assert abs(found.value - float(op.to_dense().trace())) < 8 * found.error
    with pytest.raises(ExpressionError, match="leave out method="):
        trace(op, products=products, method="hutch++")

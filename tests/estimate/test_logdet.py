"""Log-determinants and effective dimensions: unbiased, with errors that cover, exact where structure allows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator

from curvalg import (
    CheckpointError,
    ConvergenceError,
    CurvalgWarning,
    ExpressionError,
    FactsError,
    Identity,
    Problem,
    ProblemError,
    registry,
)
from curvalg.estimate import effective_dimension, logdet
from tests.support import zoo
from tests.support.spectra import F64, SPECTRA, matrix

DAMPING = 0.3
SPECTRUM = torch.logspace(1, -4, 150, dtype=F64)
A = matrix(SPECTRUM)


def _logdet(given, **options):
    return logdet(given + DAMPING * torch.eye(len(given), dtype=given.dtype), **options)


def _dimension(given, **options):
    return effective_dimension(given, DAMPING, **options)


ESTIMATORS = {
    "logdet": (_logdet, lambda s: float((s + DAMPING).log().sum())),
    "effective dimension": (_dimension, lambda s: float((s / (s + DAMPING)).sum())),
}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_unbiased_and_covered(name, dtype):
    estimate, truth = ESTIMATORS[name][0], ESTIMATORS[name][1](SPECTRUM)
    found = [estimate(A.to(dtype), seed=seed) for seed in range(40)]
    values = torch.tensor([f.value for f in found], dtype=F64)
    assert abs(float(values.mean()) - truth) <= 4 * float(values.std()) / len(values) ** 0.5 + 1e-5 * abs(truth)
    assert sum(abs(f.value - truth) <= 2 * f.error for f in found) >= 0.85 * len(found)
    # Errors that are honest are not much too large either.
    assert sum(f.error for f in found) / len(found) < 2 * float(values.std())
    assert all(f.products == 502 and f.converged and f.method == "slq" for f in found)


@pytest.mark.parametrize("products", [40, 120])
def test_few_steps_have_errors_that_cover(products):
    spectrum = torch.logspace(0, -5, 200, dtype=F64)
    B, truth = matrix(spectrum), float(spectrum.log().sum())
    found = [logdet(B, products=products, steps=10, seed=seed) for seed in range(40)]
    assert sum(abs(f.value - truth) <= 2 * f.error for f in found) >= 0.85 * len(found)


@pytest.mark.parametrize("name", SPECTRA)
def test_known_spectra(name):
    B = matrix(SPECTRA[name]) @ matrix(SPECTRA[name])
    for estimator, truth in ESTIMATORS.values():
        found = estimator(B, products=min(400, 40 * len(B)))
        expected = truth(SPECTRA[name] ** 2)
        assert abs(found.value - expected) <= 4 * found.error + 1e-9 * abs(expected) + 1e-9


@pytest.mark.parametrize("case", ["mlp", "cnn"])
def test_a_model(case, monkeypatch):
    made = zoo.make(case)
    problem = Problem(made.model, made.loss, made.batches, **made.options)
    ggn = registry.build("ggn")
    damped, plain = (ggn + DAMPING * Identity).lower(problem), ggn.lower(problem)
    values = torch.linalg.eigvalsh(plain.to_dense().double()).clamp_min(0)
    exact = [logdet(damped), effective_dimension(plain, DAMPING)]
    for estimate, (_, truth) in zip(exact, ESTIMATORS.values(), strict=True):
        assert estimate.method == "exact" and estimate.error == 0.0 and estimate.products == 0
        assert math.isclose(estimate.value, truth(values), rel_tol=1e-4, abs_tol=1e-4)
    shifted = effective_dimension(damped, 0.7)  # all that is orthogonal to the columns counts too
    assert math.isclose(shifted.value, float(((values + DAMPING) / (values + DAMPING + 0.7)).sum()), rel_tol=1e-4)
    monkeypatch.setattr(type(damped), "exact_rows", lambda *_: None)
    estimated = [logdet(damped, products=300), effective_dimension(plain, DAMPING, products=300)]
    for estimate, known in zip(estimated, exact, strict=True):
        assert estimate.method == "slq" and abs(estimate.value - known.value) <= 4 * estimate.error + 1e-4


@pytest.mark.parametrize("estimate", [_logdet, _dimension])
def test_a_tolerance_doubles_the_probes(estimate):
    rough = estimate(A, products=100, steps=25)
    fine = estimate(A, products=100, steps=25, tol=0.02)
    assert fine.converged and fine.error <= 0.02 * abs(fine.value) and fine.products > rough.products == 102
    assert (fine.products - 2) % 100 == 0 and math.log2((fine.products - 2) / 100) % 1 == 0


def test_a_tolerance_that_is_not_reached_is_loud(inside):
    inside(doublings=2)
    with pytest.raises(
        ConvergenceError, match=r"logdet is .* ± .* after 402 products, .* raise products= or tol="
    ) as caught:
        _logdet(A, products=100, steps=25, tol=1e-5)
    assert not caught.value.result.converged and caught.value.result.error > 0
    with pytest.warns(CurvalgWarning, match="not yet within"):
        assert not _logdet(A, products=100, steps=25, tol=1e-5, on_fail="warn").converged
    with pytest.raises(ConvergenceError, match="raise steps="):
        logdet(matrix(torch.logspace(0, -6, 150, dtype=F64)), products=400, steps=4, tol=1e-3)


def test_products_are_split_into_probes_and_steps():
    assert _logdet(A, products=60).products == 3 * 17 + 2
    assert _logdet(A, products=60, steps=20).products == 62
    assert _logdet(A, products=5, steps=20).products == 7
    few = _logdet(A, products=4)
    assert few.products == 6 and math.isfinite(few.error)
    assert math.isnan(_logdet(A, products=2).error) and _logdet(0.7 * torch.eye(9), products=2).error < 1e-5
    assert math.isnan(_logdet(A, products=1).error)


def test_operators_that_are_not_definite():
    problem = Problem(torch.nn.Linear(9, 3), torch.nn.CrossEntropyLoss(), (torch.randn(8, 9), torch.arange(8) % 3))
    H, G = (registry.build(name).lower(problem) for name in ("residual", "ggn"))
    with pytest.raises(FactsError, match=r"logdet needs a positive definite operator, but ggn .* add damping, "):
        logdet(G)
    with pytest.raises(FactsError, match=r"not known to be; take a positive semidefinite term, such as ggn"):
        logdet(H)
    with pytest.raises(FactsError, match="effective_dimension needs a positive semidefinite operator, but residual"):
        effective_dimension(H, 0.1)
    indefinite = matrix(SPECTRA["indefinite"])
    with pytest.raises(FactsError, match=r"logdet needs a positive definite operator, but .* Ritz value -"):
        logdet(indefinite)
    with pytest.raises(FactsError, match="effective_dimension needs a positive semidefinite operator"):
        effective_dimension(indefinite, 2.0)
    with pytest.raises(FactsError, match="Ritz value 0"):
        logdet(torch.zeros(5, 5))
    with pytest.raises(FactsError, match="expected a symmetric operator"):
        logdet(torch.triu(A))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"products": 0}, "expected products to be an integer ≥ 1, got 0"),
        ({"steps": 0}, "expected steps"),
        ({"tol": 0.0}, "expected a relative tolerance 0 < tol < 1"),
        ({"tol": float("nan")}, "expected a relative tolerance"),
        ({"on_fail": "ignore"}, "expected on_fail"),
        ({"damping": 0.0}, "expected a damping > 0, got 0.0"),
        ({"damping": -1.0}, "expected a damping > 0"),
        ({"damping": float("nan")}, "expected a damping"),
        ({"damping": "small"}, "expected a damping"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ExpressionError, match=message):
        effective_dimension(**{"op": A, "damping": 1.0, **options})
    if "damping" not in options:
        with pytest.raises(ExpressionError, match=message):
            logdet(A, **options)


def test_products_that_are_not_finite():
    count = [0]

    def product(x):
        count[0] += 1
        return A.numpy() @ x if count[0] < 5 else np.full_like(x, np.nan)

    with pytest.raises(ProblemError, match="expected finite products"):
        logdet(LinearOperator(A.shape, matvec=product, matmat=product, dtype=float))


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path):
    path, count = tmp_path / "run.safetensors", [0, 35]
    B = (A + DAMPING * torch.eye(150, dtype=F64)).numpy()

    def product(x):
        count[0] += 1
        if count[0] == count[1]:
            raise KeyboardInterrupt
        return B @ x

    op = LinearOperator(B.shape, matvec=product, matmat=product, dtype=float)
    options = {"products": 100, "steps": 25, "tol": 0.02}
    part = logdet(op, checkpoint=path, **options)
    assert part.partial and not part.converged
    done = logdet(op, checkpoint=path, **options)
    count[0] = 1000
    whole = logdet(op, **options)
    assert (done.value, done.error, done.products) == (whole.value, whole.error, whole.products)
    with pytest.raises(CheckpointError, match="algorithm differs"):
        effective_dimension(op, 1.0, checkpoint=path, **options)


@pytest.mark.parametrize("products", [60, 100, 400])
@pytest.mark.parametrize("function", [logdet, lambda A, **options: effective_dimension(A, 0.1, **options)])
def test_errors_cover_also_with_few_probes(function, products):
    """A handful of numbers says little about their own spread."""
    spectrum = torch.linspace(0.1, 3, 51, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(51, 51, generator=torch.Generator().manual_seed(5), dtype=torch.float64)).Q
    A = Q @ torch.diag(spectrum) @ Q.T
    truth = float(spectrum.log().sum() if function is logdet else (spectrum / (spectrum + 0.1)).sum())
    found = [function(A, products=products, seed=seed) for seed in range(60)]
    assert sum(abs(f.value - truth) <= 2 * f.error for f in found) >= 0.88 * 60

"""Reported errors are standard errors: how often the truth lies within two of them, over seeds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from curvalg import Problem, registry
from curvalg.estimate import diagonal, effective_dimension, logdet, norm, spectral_density, tic, trace
from tests.support.nightly import NIGHTLY

SEEDS = 400 if NIGHTLY else 60
SLACK = 0 if NIGHTLY else 6
"""Per cent that a share of few seeds may be off: more than two of its own standard errors."""
PRODUCTS = (12, 24, 40, 60) if NIGHTLY else (12, 40)
DAMPING = 1e-2
EDGE = 0.02


@functools.cache
def problem() -> Problem:
    """Trained for a while, so that its spectrum has outliers and a bulk."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    X, y = torch.randn(60, 10).double(), torch.randint(0, 3, (60,))
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(X), y).backward()
        optimiser.step()
    return Problem(net, nn.CrossEntropyLoss(), (X, y))


@functools.cache
def dense(name: str) -> torch.Tensor:
    return registry.build(name).lower(problem()).to_dense()


def damped(A: torch.Tensor) -> torch.Tensor:
    return A + DAMPING * torch.eye(len(A), dtype=A.dtype)


@dataclass(frozen=True)
class Quantity:
    """What is estimated.

    Args:
        estimate: (matrix, products, seed) -> Estimate.
        truth: of the matrix.
        least, most: per cent of the values that lie within two errors.
        matrices: of which.
    """

    estimate: Callable
    truth: Callable
    least: float = 92
    most: float = 98
    matrices: tuple[str, ...] = ("hessian", "ggn")


def _trace(method: str) -> Callable:
    return lambda A, products, seed: trace(A, products=products, seed=seed, method=method)


def _fro(method: str) -> Callable:
    return lambda A, products, seed: norm(A, products=products, seed=seed, method=method)


def _density(A, products, seed):
    return spectral_density(A, probes=max(2, products // 6), steps=6, seed=seed).count(EDGE, 1e3)


QUANTITIES = {
    "trace, hutch++": Quantity(_trace("hutch++"), torch.trace),
    "trace, xtrace": Quantity(_trace("xtrace"), torch.trace),
    "trace, xnystrace": Quantity(_trace("xnystrace"), torch.trace, 85, 100, ("ggn",)),
    "trace, hutchinson": Quantity(_trace("hutchinson"), torch.trace, 85, 100),
    "diagonal, xdiag": Quantity(lambda A, p, s: diagonal(A, products=p, seed=s), torch.diagonal, 85, 100),
    "diagonal, hutchinson": Quantity(
        lambda A, p, s: diagonal(A, products=p, seed=s, method="hutchinson"), torch.diagonal, 85, 100
    ),
    "norm, xnystrace": Quantity(_fro("xnystrace"), torch.linalg.matrix_norm, 85, 100),
    "norm, hutchinson": Quantity(_fro("hutchinson"), torch.linalg.matrix_norm, 85, 100),
    "logdet": Quantity(
        lambda A, p, s: logdet(damped(A), products=p, seed=s), lambda A: torch.logdet(damped(A)), 85, 100, ("ggn",)
    ),
    "effective dimension": Quantity(
        lambda A, p, s: effective_dimension(A, DAMPING, products=p, seed=s),
        lambda A: torch.trace(torch.linalg.solve(damped(A), A)),
        85,
        100,
        ("ggn",),
    ),
    "count of a density": Quantity(_density, lambda A: (torch.linalg.eigvalsh(A) >= EDGE).sum(), 85, 100),
}


def share(estimates, truth) -> float:
    """Per cent of all entries."""
    hits = [torch.as_tensor(abs(torch.as_tensor(e.value) - truth) <= 2 * torch.as_tensor(e.error)) for e in estimates]
    return 100 * float(torch.stack(hits).double().mean())


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize(("name", "matrix"), [(n, m) for n, q in QUANTITIES.items() for m in q.matrices])
def test_two_errors_cover(name, matrix, products, record_property):
    quantity, A = QUANTITIES[name], dense(matrix)
    found = share((quantity.estimate(A, products, s) for s in range(SEEDS)), quantity.truth(A))
    record_property("share", found)
    assert quantity.least - SLACK <= found <= quantity.most + SLACK


@pytest.mark.parametrize("method", ["xtrace", "hutch++"])
@pytest.mark.parametrize("products", [12, 24])
def test_two_errors_cover_tic(method, products):
    ggn = registry.build("ggn")
    true = float(torch.trace(torch.linalg.solve(damped(dense("ggn")), dense("covariance"))))
    found = share(
        (
            tic(problem(), hessian=ggn, damping=DAMPING, products=products, method=method, seed=s)
            for s in range(SEEDS if NIGHTLY else 20)
        ),
        true,
    )
    assert found >= 90 - 2 * SLACK

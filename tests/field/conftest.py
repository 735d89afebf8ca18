"""What the field tests share: references of the whole data set as one batch, and a comparison that repeats itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import registry
from tests.support.dense import Case, Dense
from tests.support.field.data import CE, N, Net, X, Y, ce

TERMS = ("hessian", "ggn", "residual", "covariance", "centered_covariance")


@pytest.fixture
def build_net():
    """Module factory -> a float64 module with fixed random weights."""

    def build(factory, *args, seed=0, dtype=torch.float64, **kwargs):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return factory(*args, **kwargs).to(dtype)

    return build


@pytest.fixture
def net(build_net):
    """Two layers; extra inputs are added."""
    return build_net(Net)


@pytest.fixture
def whole(net):
    """The reference of (X, Y) under plain cross-entropy, as one batch."""
    return Dense(Case(net, CE, [(X, Y)], ce, float(N)))


@pytest.fixture
def dense():
    """(model, batches, unreduced loss rows, denominator) -> dense matrices by torch.func alone."""

    def make(model: nn.Module, batches, rows, denominator, **options) -> Dense:
        return Dense(Case(model, None, batches, rows, denominator, **options))

    return make


@pytest.fixture
def agrees(vectors):
    """Every product of a problem, three times over, kept and fresh, equals the dense reference."""

    def check(problem, reference, terms=TERMS, tolerance=1e-10, gradient=True):
        for cache in (problem.cache, 0):
            problem.close()
            problem.cache = cache
            for name in terms:
                op = registry.build(name).lower(problem)
                expected = reference.matrix(name)
                assert op.shape == tuple(expected.shape)
                V = vectors(expected.shape[1], 2)
                for _ in range(3):
                    got = (op @ V).double()
                    error = (got - expected @ V).norm() / (expected @ V).norm().clamp(min=1e-3)
                    assert error <= tolerance, f"{name}, cache={cache}: relative error {error:.2e}"
        if gradient:
            error = (problem.gradient().double() - reference.gradient).norm()
            assert error <= tolerance * reference.gradient.norm().clamp(min=1e-3)

    return check

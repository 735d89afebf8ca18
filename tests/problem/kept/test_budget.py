"""What may be kept with cache="auto": a quarter of what is free, and nothing that would not fit then."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from curvalg import registry


@pytest.fixture
def free(inside):
    """Sets what is free from now on."""
    left = [8000]
    inside(free_memory=lambda device: left[0])

    def now(number: int) -> None:
        left[0] = number

    return now


def test_a_quarter_of_what_is_free_is_the_limit(free, problem_of):
    problem = problem_of("mlp")
    assert problem.budget.limit == 2000
    free(4000)
    assert problem.budget.limit == 2000  # as it was when the problem was made
    problem.cache = "auto"
    assert problem.budget.limit == 1000
    for copied in (copy.copy(problem), pickle.loads(pickle.dumps(problem))):
        assert copied.budget.limit == 1000


def test_what_would_not_fit_now_is_not_kept(free, problem_of, dense_of, vectors):
    free(2**34)
    dense, problem = dense_of("mlp"), problem_of("mlp", columns="loop")
    V = vectors(dense.D)
    free(100)
    for name in ("hessian", "covariance"):
        op = registry.build(name).lower(problem)
        for _ in range(40):  # past the products after which other ways are tried
            assert torch.allclose(op @ V, dense.matrix(name) @ V, atol=1e-12)
    assert problem.budget.used == 0
    assert "of a budget of" in op.explain() or "do not fit" in op.explain()
    free(2**34)
    problem.cache = 2**20  # the user's own number is taken at its word
    free(0)
    registry.build("hessian").lower(problem) @ V
    assert problem.budget.used > 0

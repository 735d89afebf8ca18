"""Diagonals of the GGN and the covariance against dense matrices."""

from __future__ import annotations

import pytest
import torch

from curvalg import CurvalgError, Identity, LossError, inverse, registry

build = registry.build
CASES = ["linear", "mlp", "cnn", "encoder_layer", "lstm", "tied_embedding", "sequence_classes_second", "batchnorm_eval"]


@pytest.mark.parametrize("case", CASES)
def test_equal_the_dense_diagonal(case, problem_of, dense_of):
    dense = dense_of(case)
    ones = torch.ones(dense.D).double()
    for name, matrix in (("ggn_diagonal", dense.ggn), ("covariance_diagonal", dense.covariance)):
        got = build(name).lower(problem_of(case)) @ ones
        assert (got - matrix.diagonal()).norm() <= 1e-10 * matrix.diagonal().norm()


def test_draws_are_those_of_the_monte_carlo_ggn_and_average_to_the_exact_one(problem_of, dense_of):
    problem, dense = problem_of("mlp"), dense_of("mlp")
    ones = torch.ones(dense.D).double()
    got = build("ggn_diagonal", samples=3, seed=2).lower(problem) @ ones
    assert torch.allclose(got, build("ggn_mc", samples=3, seed=2).lower(problem).to_dense().diagonal(), atol=1e-12)
    many = build("ggn_diagonal", samples=4000).lower(problem) @ ones
    exact = dense.ggn.diagonal()
    assert (many - exact).norm() <= 0.05 * exact.norm()


def test_it_preconditions(problem_of, dense_of, vectors):
    problem, dense = problem_of("mlp"), dense_of("mlp")
    V = vectors(dense.D)
    op = inverse(build("ggn") + 0.1 * Identity, solver="cg", preconditioner=build("ggn_diagonal") + 0.1 * Identity)
    A = dense.ggn + 0.1 * torch.eye(dense.D)
    assert torch.allclose(op.lower(problem) @ V, torch.linalg.solve(A, V), atol=1e-6)


def test_wrong_options_and_losses(problem_of):
    for options in ({"samples": -1}, {"seed": -1}, {"samples": True}):
        with pytest.raises(CurvalgError):
            build("ggn_diagonal", **options)
    with pytest.raises(LossError, match="square root"):
        build("ggn_diagonal").lower(problem_of("gaussian_nll")).prepare()

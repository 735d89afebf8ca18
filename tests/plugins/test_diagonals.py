"""Diagonals against dense matrices, and norms of the gradients of single samples."""

from __future__ import annotations

import pytest
import torch

from curvalg import CurvalgError, Identity, LossError, Problem, diagonal_part, inverse, parse, registry
from curvalg.estimate import gradient_norms

build = registry.build
CASES = ["linear", "mlp", "cnn", "encoder_layer", "lstm", "tied_embedding", "sequence_classes_second", "batchnorm_eval"]


@pytest.mark.parametrize("case", CASES)
def test_equal_the_dense_diagonal(case, problem_of, dense_of):
    dense = dense_of(case)
    ones = torch.ones(dense.D).double()
    matrices = {
        "ggn_diagonal": dense.ggn,
        "covariance_diagonal": dense.covariance,
        "centered_covariance_diagonal": dense.centered_covariance,
    }
    for name, matrix in matrices.items():
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


@pytest.mark.parametrize("name", ["covariance_diagonal", "centered_covariance_diagonal"])
def test_samples_may_be_positions(name, problem_of):
    problem = problem_of("sequence_classes_second", samples="position")
    dense = build(name.removesuffix("_diagonal")).lower(problem).to_dense()
    got = build(name).lower(problem) @ torch.ones(problem.size).double()
    assert (got - dense.diagonal()).norm() <= 1e-10 * dense.diagonal().norm()


@pytest.mark.parametrize("samples", ["item", "position"])
@pytest.mark.parametrize("case", ["mlp", "cnn", "encoder_layer", "sequence_classes_second", "tied_embedding"])
def test_norms_are_those_of_the_gradients(case, samples, problem_of):
    problem = problem_of(case, samples=samples)
    with problem.batches() as batches:
        gradients = [torch.cat([g.flatten(1) for g in b.per_sample_gradients().values()], 1) for b in batches]
    expected = torch.cat(gradients).norm(dim=1)
    assert torch.allclose(gradient_norms(problem), expected, rtol=1e-10, atol=1e-14)


def test_norms_need_a_loss():
    with pytest.raises(LossError, match="loss=None"):
        gradient_norms(Problem(torch.nn.Linear(2, 1), None, torch.ones(3, 2)))


def test_probing_is_the_mean_of_its_formula(problem_of, dense_of):
    problem, dense = problem_of("mlp"), dense_of("mlp")
    ones = torch.ones(dense.D).double()
    signs = 2.0 * torch.randint(0, 2, (dense.D, 5), generator=torch.Generator().manual_seed(3)).double() - 1
    expected = (signs * (dense.hessian @ signs)).mean(1)
    assert torch.allclose(build("hessian_diagonal", probes=5, seed=3).lower(problem) @ ones, expected, atol=1e-12)


def test_probing_is_unbiased_with_the_variance_it_states(problem_of, dense_of):
    problem, dense = problem_of("mlp"), dense_of("mlp")
    ones, exact = torch.ones(dense.D).double(), dense.hessian.diagonal()
    seeds, probes = 40, 20
    found = [build("hessian_diagonal", probes=probes, seed=s).lower(problem) @ ones for s in range(seeds)]
    error = torch.stack(found) - exact
    variance = (dense.hessian.square().sum(1) - exact.square()) / probes
    assert (error.mean(0).abs() <= 5 * (variance / seeds).sqrt() + 1e-12).all()
    assert float(error.square().mean(0).sum() / variance.sum()) == pytest.approx(1, abs=0.25)


def test_probes_are_not_spent_where_structure_answers(problem_of):
    problem = problem_of("mlp")
    kfac = build("kfac")
    estimate = diagonal_part(kfac + 2 * kfac, probes=1).lower(problem).to_dense()
    assert torch.allclose(estimate, diagonal_part(3 * kfac).lower(problem).to_dense(), atol=1e-12)


def test_probing_is_written_and_read_back():
    expr = build("hessian_diagonal", probes=7, seed=2)
    assert str(expr) == "diagonal_part(hessian, probes=7, seed=2)"
    assert parse(str(expr)) == expr
    assert r"\mathrm{probes=7,\, seed=2}" in expr._repr_latex_()
    assert expr.tree().startswith("diagonal_part probes=7, seed=2")
    for options in ({"probes": 0}, {"probes": -1}, {"seed": -1}, {"probes": 1.5}):
        with pytest.raises(CurvalgError):
            build("hessian_diagonal", **options)


class Bent(torch.nn.Module):
    """A weight that is used in a function that is not linear in it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.last((x @ self.first.weight.exp().T).tanh())


def test_the_route_is_explained():
    data = (torch.randn(5, 3), torch.randn(5, 2))
    op = build("ggn_diagonal").lower(Problem(Bent(), torch.nn.MSELoss(), data)).prepare()
    assert "gradients of every row of" in op.explain() and "layer inputs and deltas of" in op.explain()

"""The plugin contracts, each proved by terms that know only public names."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from curvalg import DatasetTerm, ExpressionError, GradientTerm, Identity, MatrixTerm, Term, registry, restrict
from tests.support.third_party import (
    CenteredTangent,
    ForwardDifference,
    GradientOuter,
    MeanTangent,
    Skewed,
    WeightedBlocks,
    dense_weighted_blocks,
)


def close(got, expected):
    assert (got - expected).norm() <= 1e-10 * expected.norm()


@pytest.fixture
def world(dense_of, problem_of):
    """The dense matrices and the problem of one case."""
    return dense_of("mlp"), problem_of("mlp")


def _mean_tangent(dense):
    return torch.outer(dense.gradient, dense.jacobian.sum(0))


def _centered(dense, outputs=3):
    J = dense.jacobian.reshape(-1, outputs, dense.D)
    J = J - J.mean(0)
    return torch.einsum("nci,ncj->ij", J, J)


def _skewed(dense, power=1.0):
    J = dense.jacobian.reshape(-1, 3, dense.D)
    return dense.residual + power * torch.einsum("nci,ncj->ij", J, J.roll(1, 1))


@pytest.mark.parametrize(
    ("term", "reference"),
    [(Skewed(0.5), lambda d: _skewed(d, 0.5)), (MeanTangent(), _mean_tangent), (CenteredTangent(), _centered)],
    ids=["Term", "DatasetTerm", "symmetric DatasetTerm"],
)
def test_local_terms_and_their_transposes(world, term, reference, vectors):
    dense, problem = world
    V, expected = vectors(dense.D), reference(dense)
    for _ in range(3):
        close(term.lower(problem) @ V, expected @ V)
        close(term.T.lower(problem) @ V, expected.T @ V)


def test_all_kinds_in_one_sum(world, vectors):
    dense, problem = world
    expr = 2 * Skewed().T - MeanTangent() + MeanTangent().T / 4 + registry.build("hessian") + 3 * CenteredTangent()
    expr = expr + GradientOuter(2.0) - 0.1 * Identity
    mean = _mean_tangent(dense)
    g = dense.gradient
    expected = 2 * _skewed(dense).T - mean + mean.T / 4 + dense.hessian + 3 * _centered(dense)
    expected = expected + 2 * torch.outer(g, g) / g.norm() ** 2 - 0.1 * torch.eye(dense.D).double()
    V = vectors(dense.D)
    op = expr.lower(problem)
    for _ in range(3):
        close(op @ V, expected @ V)


def test_matrix_terms_finish_as_structured_leaves(world, vectors):
    dense, problem = world
    V = vectors(dense.D)
    op = (WeightedBlocks() + 0.5 * Identity).lower(problem)
    expected = dense_weighted_blocks(problem.layout.unflatten(dense.gradient)) + 0.5 * torch.eye(dense.D).double()
    assert "accumulated over the data at the first product" in op.explain()
    close(op @ V, expected @ V)
    assert "Kronecker<5 x 4, float64>" in op.explain()


def test_matrix_terms_are_made_once_per_state(world, counted_model):
    problem, calls = counted_model("mlp")
    op = GradientOuter().lower(problem)
    op @ torch.ones(problem.size).double()
    made = calls()
    op @ torch.ones(problem.size).double()
    (GradientOuter() + Identity).lower(problem) @ torch.ones(problem.size).double()
    assert calls() == made > 0


def test_matrix_term_inside_a_restriction_sees_the_restricted_layout(world, vectors):
    dense, problem = world
    op = restrict(GradientOuter(), "2.*").lower(problem)
    g = dense.gradient[25:]
    V = vectors(len(g))
    close(op @ V, torch.outer(g, g) / g.norm() ** 2 @ V)


def test_wrong_shaped_cotangents_are_refused(world):
    @dataclass(frozen=True)
    class Broadcasting(Term):
        def cotangent_dot(self, batch, tangent):
            return tangent.sum(-1, keepdim=True)

    @dataclass(frozen=True)
    class WrongU(Term):
        def cotangent(self, batch):
            return batch.loss_gradient[:, :1]

    for term in (Broadcasting(), WrongU()):
        with pytest.raises(ExpressionError, match="must return a tensor of the output's shape"):
            term.lower(world[1]) @ torch.ones(world[0].D).double()


def test_a_projecting_term_that_is_not_known_symmetric_cannot_be_transposed(world):
    @dataclass(frozen=True)
    class Projecting(DatasetTerm):
        def project(self, vector, prepared):
            return vector.sum()

        def cotangent_dot(self, batch, tangent, prepared, totals):
            return batch.loss_gradient * totals

    close(
        Projecting().lower(world[1]) @ torch.ones(world[0].D).double(),
        world[0].gradient * world[0].D,
    )
    with pytest.raises(ExpressionError, match="facts"):
        Projecting().T.lower(world[1])


def test_finish_must_return_an_expression(world):
    @dataclass(frozen=True)
    class Raw(MatrixTerm):
        def accumulate(self, batch, prepared=None):
            return torch.ones(())

        def finish(self, stats, layout, prepared=None):
            return stats

    with pytest.raises(ExpressionError, match="finish must return an expression"):
        Raw().lower(world[1]) @ torch.ones(world[0].D).double()


def test_covariance_diagonal_comes_in_through_its_entry_point(world, vectors):
    dense, problem = world
    term = registry.build("covariance_diagonal")
    assert registry.spec("covariance_diagonal").distribution == "curvalg"
    V = vectors(dense.D)
    close(term.lower(problem) @ V, dense.covariance.diagonal()[:, None] * V)
    close(
        (registry.build("covariance") - term).lower(problem) @ V,
        dense.covariance @ V - dense.covariance.diagonal()[:, None] * V,
    )


def test_gradient_terms_multiply_by_gradients_at_other_parameters(world, vectors):
    dense, problem = world
    V, op = vectors(dense.D), ForwardDifference().lower(problem)
    before = problem.gradient()
    assert (op @ V - dense.hessian @ V).norm() <= 1e-4 * (dense.hessian @ V).norm()
    assert "a step of 1e-06 on one side" in op.explain()
    assert torch.equal(problem.gradient(), before)
    with pytest.raises(ExpressionError, match="transpose of ForwardDifference"):
        ForwardDifference().T.lower(problem)


def test_gradient_terms_are_refused_where_their_product_has_no_meaning(world):
    @dataclass(frozen=True)
    class Short(GradientTerm):
        def multiply(self, gradients, vector):
            return vector[:1]

    @dataclass(frozen=True)
    class Writes(GradientTerm):
        def multiply(self, gradients, vector):
            return vector.mul_(2)

    @dataclass(frozen=True)
    class Misspelt(GradientTerm):
        def mutliply(self, gradients, vector):
            return vector

    for term, says in (
        (Short(), "must return a tensor of the vector's shape"),
        (Writes(), "writes into a tensor"),
        (Misspelt(), "does not define multiply"),
    ):
        with pytest.raises(ExpressionError, match=says):
            term.lower(world[1]) @ torch.ones(world[0].D).double()

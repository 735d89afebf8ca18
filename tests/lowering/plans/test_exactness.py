"""Every term equals its dense reference on every kind of model, product after product."""

from __future__ import annotations

import pytest
import torch

from curvalg import Identity, registry
from tests.support.agreement import SUMS, TERMS, close
from tests.support.zoo import ZOO


@pytest.mark.parametrize("model", ZOO)
@pytest.mark.parametrize("term", TERMS)
def test_term_equals_dense_three_times(model, term, dense_of, problem_of, vectors):
    op = registry.build(term).lower(problem_of(model))
    expected = dense_of(model).matrix(term)
    V = vectors(op.shape[1])
    for _ in range(3):
        close(op @ V, expected @ V)
    W = vectors(op.shape[0], 2)
    close(op.T @ W, expected.T @ W)


@pytest.mark.parametrize("model", ZOO)
@pytest.mark.parametrize("combination", SUMS)
def test_sum_equals_dense_three_times(model, combination, dense_of, problem_of, vectors):
    coefficients, shift = SUMS[combination]
    expr = sum((c * registry.build(n) for n, c in coefficients.items()), shift * Identity)
    dense = dense_of(model)
    expected = sum(c * dense.matrix(n) for n, c in coefficients.items()) + shift * torch.eye(dense.D).double()
    op = expr.lower(problem_of(model))
    V = vectors(dense.D)
    for _ in range(3):
        close(op @ V, expected @ V)


@pytest.mark.parametrize("model", ["mlp", "batchnorm_eval", "tied_embedding", "several_outputs"])
def test_value_and_gradient(model, dense_of, problem_of):
    case_problem = problem_of(model)
    close(case_problem.gradient(), dense_of(model).gradient)


@pytest.mark.parametrize("model", sorted(set(ZOO) - {"batchnorm_training"}))
def test_one_batch_and_ragged_batches_agree(model, problem_of, vectors):
    ragged = problem_of(model)
    X, y = (torch.cat(parts) for parts in zip(*ragged.data.source, strict=True))
    whole = problem_of(model, (X, y))
    expr = registry.build("hessian") + 2 * registry.build("centered_covariance") - registry.build("ggn")
    V = vectors(ragged.size)
    close(expr.lower(whole) @ V, expr.lower(ragged) @ V)


def test_products_and_powers(dense_of, problem_of, vectors):
    H, G, U = (dense_of("mlp").matrix(n) for n in ("hessian", "ggn", "covariance"))
    h, g, u = (registry.build(n) for n in ("hessian", "ggn", "covariance"))
    V = vectors(len(H))
    problem = problem_of("mlp")
    for expr, expected in (
        (g @ h - u @ h / 3 + g, G @ H - U @ H / 3 + G),
        ((h + Identity) @ (g - u) @ h, (H + torch.eye(len(H)).double()) @ (G - U) @ H),
        (h**3, H @ H @ H),
        ((g @ h).T, H @ G),
        (u**2 @ g + h @ g, U @ U @ G + H @ G),
    ):
        close(expr.lower(problem) @ V, expected @ V)


def test_jacobian_products(dense_of, problem_of, vectors):
    dense = dense_of("sequence_classes_second")
    J, B = dense.jacobian, dense.loss_hessian
    j, b = registry.build("jacobian"), registry.build("loss_hessian")
    problem = problem_of("sequence_classes_second")
    V, W = vectors(dense.D), vectors(len(B))
    close((b @ j).lower(problem) @ V, B @ J @ V)
    close((j @ j.T).lower(problem) @ W, J @ J.T @ W)
    close((j.T @ j).lower(problem) @ V, J.T @ J @ V)
    close((j.T @ b @ j).lower(problem) @ V, J.T @ B @ J @ V)
    assert "ggn" in (j.T @ b @ j).lower(problem).explain()

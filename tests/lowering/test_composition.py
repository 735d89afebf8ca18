"""Operators of different problems over the same parameters compose lazily, for arrays and tensors alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from curvalg import ExpressionError, Identity, Problem, inverse, registry


@pytest.fixture
def worlds():
    """A model with training and test data, and dense matrices."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    train = Problem(model, nn.MSELoss(), (torch.randn(6, 3).double(), torch.randn(6, 2).double()))
    test = Problem(model, nn.MSELoss(), (torch.randn(5, 3).double(), torch.randn(5, 2).double()))
    return train, test


def test_test_jacobian_times_training_inverse(worlds):
    train, test = worlds
    J, inv = registry.build("jacobian").lower(test), inverse(registry.build("ggn") + 0.1 * Identity).lower(train)
    op = J @ inv @ J.T
    dense = (
        J.to_dense()
        @ torch.linalg.inv(registry.build("ggn").lower(train).to_dense() + 0.1 * torch.eye(train.size))
        @ J.to_dense().T
    )
    assert op.shape == (10, 10)
    W = torch.randn(10, 3).double()
    assert torch.allclose(op @ W, dense @ W, atol=1e-9)
    assert torch.allclose(op @ W[:, 0], dense @ W[:, 0], atol=1e-9)
    np.testing.assert_allclose(op @ W.numpy(), (dense @ W).numpy(), atol=1e-9)
    np.testing.assert_allclose(op.rmatvec(W[:, 0].numpy()), (dense.T @ W[:, 0]).numpy(), atol=1e-9)
    assert torch.allclose(op.to_dense(), dense, atol=1e-9)
    assert torch.allclose((J @ inv).T @ W, (J.to_dense() @ inv.to_dense()).T @ W, atol=1e-9)


def test_sums_scales_and_layouts(worlds):
    train, test = worlds
    A, B = registry.build("ggn").lower(train), registry.build("hessian").lower(test)
    a, b = A.to_dense(), B.to_dense()
    op = 2 * (A - B) / 4 + (-A)
    expected = (a - b) / 2 - a
    v = torch.randn(train.size).double()
    assert torch.allclose(op @ v, expected @ v, atol=1e-10)
    assert torch.allclose(v @ op, v @ expected, atol=1e-10)
    tree = op @ train.layout.unflatten(v)
    assert torch.allclose(train.layout.flatten(tree), expected @ v, atol=1e-10)
    assert torch.allclose(op.T @ v, expected.T @ v, atol=1e-10)
    assert "ggn" in repr(op) and "hessian" in repr(op)


def test_foreign_operators_still_compose(worlds):
    import scipy.sparse.linalg as sla

    train, test = worlds
    A, B = registry.build("ggn").lower(train), registry.build("ggn").lower(test)
    mixed = (A + B) + sla.aslinearoperator(np.eye(train.size))
    x = np.ones(train.size)
    np.testing.assert_allclose(mixed @ x, A @ x + B @ x + x, atol=1e-10)


def test_what_does_not_fit_is_refused(worlds):
    train, _ = worlds
    other = Problem(nn.Linear(12, 2).double(), nn.MSELoss(), (torch.randn(6, 12).double(), torch.randn(6, 2).double()))
    assert other.size == train.size
    with pytest.raises(ExpressionError, match="share names and shapes"):
        registry.build("ggn").lower(train) + registry.build("ggn").lower(other)
    with pytest.raises(ExpressionError, match="vectors between them differ"):
        registry.build("jacobian").lower(other) @ registry.build("jacobian").lower(train)
    half = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    single = Problem(half, nn.MSELoss(), (torch.randn(6, 3), torch.randn(6, 2)))
    with pytest.raises(ExpressionError, match=r"float64 .* float32"):
        registry.build("ggn").lower(train) @ registry.build("ggn").lower(single)


def test_pythons_sum_adds_operators(problem_of):
    problem, other = problem_of("mlp"), problem_of("mlp")
    ggn, hessian = (registry.build(name).lower(problem) for name in ("ggn", "hessian"))
    assert sum([ggn, hessian]).expr == ggn.expr + hessian.expr
    lazy = sum([ggn, hessian.expr.lower(other)])
    torch.testing.assert_close(lazy.to_dense(), (ggn + hessian).to_dense())
    with pytest.raises(TypeError):
        1 + ggn

"""Every kind of operand, with one column or many, comes back in kind; wrong ones are refused."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from torch import nn

from curvalg import Problem, VectorError, registry


@pytest.fixture
def op(problem_of):
    return registry.build("hessian").lower(problem_of("mlp"))


@pytest.fixture
def single():
    """A float32 operator."""
    torch.manual_seed(0)
    data = (torch.randn(6, 4), torch.randint(0, 3, (6,)))
    return registry.build("ggn").lower(Problem(nn.Linear(4, 3), nn.CrossEntropyLoss(), data))


@pytest.mark.parametrize("shape", ["vector", "one column", "columns", "none"])
def test_numpy_and_torch(op, shape, vectors):
    V = vectors(op.shape[1], 3)
    x = {"vector": V[:, 0], "one column": V[:, :1], "columns": V, "none": V[:, :0]}[shape]
    expected = op.to_dense() @ x
    got = op @ x
    assert isinstance(got, torch.Tensor)
    assert torch.allclose(got, expected, atol=1e-14)
    as_array = op @ x.numpy()
    assert isinstance(as_array, np.ndarray)
    np.testing.assert_allclose(as_array, expected.numpy(), atol=1e-14)
    for product in (op.dot, op):
        np.testing.assert_array_equal(product(x.numpy()), as_array)
    if shape in ("vector", "one column"):
        np.testing.assert_array_equal(op.matvec(x.numpy()), as_array)
        np.testing.assert_allclose(op.rmatvec(x.numpy()), op.to_dense().T.numpy() @ x.numpy(), atol=1e-14)
    if x.ndim == 2:
        np.testing.assert_array_equal(op.matmat(x.numpy()), as_array)


@pytest.mark.parametrize("columns", [None, 2])
@pytest.mark.parametrize("kind", [dict, OrderedDict, list, tuple])
def test_parameter_layout(op, kind, columns, vectors):
    V = vectors(op.shape[1], columns or 1)
    x = V if columns else V[:, 0]
    tree = op.problem.layout.unflatten(x)
    operand = kind(tree) if issubclass(kind, dict) else kind(tree.values())
    got = op @ operand
    assert isinstance(got, dict if issubclass(kind, dict) else kind)
    assert torch.equal(op.problem.layout.flatten(got), op @ x)


def test_jacobian_of_a_tree_is_a_tensor_of_outputs(problem_of):
    op = registry.build("jacobian").lower(problem_of("mlp"))
    x = torch.ones(op.shape[1]).double()
    assert torch.equal(op @ op.problem.layout.unflatten(x), op @ x)
    with pytest.raises(VectorError, match="acts on outputs"):
        op.T @ op.problem.layout.unflatten(x)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float32", "float32"),
        ("float64", "float64"),
        ("int64", "float64"),
        ("bool", "float32"),
        ("complex64", "complex64"),
    ],
)
def test_numpy_result_types(single, dtype, expected):
    x = np.arange(single.shape[1]).astype(dtype) + (1j if dtype.startswith("complex") else 0)
    x = x.astype(dtype)
    got = single @ x
    assert got.dtype == np.result_type(np.float32, np.dtype(dtype)) == expected
    dense = single.to_dense().numpy()
    np.testing.assert_allclose(got, dense @ x, rtol=1e-4, atol=1e-6)
    assert single.matvec(x).dtype == expected


def test_integers_are_not_truncated(single):
    x = np.arange(single.shape[1], dtype=np.int64)
    assert not np.array_equal(single @ x, np.trunc(single @ x))


def test_complex_columns(op, vectors):
    x = vectors(op.shape[1], 4).numpy()
    z = x[:, :2] + 1j * x[:, 2:]
    np.testing.assert_allclose(op @ z, op @ x[:, :2] + 1j * (op @ x[:, 2:]), atol=1e-14)


def test_from_the_left(op, vectors):
    V = vectors(op.shape[0], 2)
    jac = registry.build("jacobian").lower(op.problem)
    W = vectors(jac.shape[0], 2)
    np.testing.assert_allclose(W[:, 0].numpy() @ jac, jac.to_dense().T.numpy() @ W[:, 0].numpy(), atol=1e-13)
    assert torch.allclose(W.T @ jac, W.T @ jac.to_dense(), atol=1e-13)
    assert torch.allclose(V[:, 0] @ op, op @ V[:, 0], atol=1e-13)


def test_results_carry_no_graph_and_operands_keep_theirs(op):
    x = torch.ones(op.shape[1]).double().requires_grad_()
    assert not (op @ x).requires_grad
    assert x.grad is None and x.requires_grad


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda n: np.ones(n + 1), "expected shape"),
        (lambda n: np.ones((n, 2, 1)), "expected shape"),
        (lambda n: torch.ones(1, n), "expected shape"),
        (lambda n: torch.ones(n, device="meta"), "expected a tensor on cpu"),
        (lambda n: torch.full((n,), torch.nan), "NaN or infinite"),
        (lambda n: np.full(n, np.inf), "NaN or infinite"),
        (lambda n: np.array(["a"] * n), "numeric"),
        (lambda n: np.ma.masked_array(np.ones(n), np.arange(n) > 3), "fill the masked entries"),
        (lambda n: csr_array(np.eye(n)), r"write .*toarray\(\)"),
        (lambda n: torch.ones(n, dtype=torch.complex64), "complex"),
        (lambda n: {"0.weight": torch.ones(5, 4)}, "missing"),
        (lambda n: [torch.ones(n)], "tensors in the order"),
        (lambda n: {"0.weight": torch.ones(4, 5), "0.bias": torch.ones(5), "2.weight": torch.ones(3, 5), "2.bias": torch.ones(3)}, "expected tensors of shapes"),
    ],
)  # fmt: skip
def test_wrong_operands(op, bad, message):
    with pytest.raises(VectorError, match=message):
        op @ bad(op.shape[1])
    assert issubclass(VectorError, ValueError)


def test_strings_and_none_are_refused(op):
    for bad in (None, "v", 3j, object()):
        with pytest.raises((VectorError, ValueError, TypeError)):
            op @ bad

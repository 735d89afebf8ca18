"""Leaves that hold arrays."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from curvalg.errors import ExpressionError, NotFiniteError
from curvalg.expr import ArrayLeaf, Diagonal, Eigenbasis, Facts, Identity, Kronecker, LowRank

LEAVES: dict[str, ArrayLeaf] = {
    "Diagonal<3, float64>": Diagonal(np.ones(3)),
    "Diagonal<4, float32>": Diagonal(torch.ones(4)),
    "Kronecker<2 x 3, float64>": Kronecker(np.eye(2), np.eye(3)),
    "Kronecker<2, float32>": Kronecker(torch.eye(2)),
    "LowRank<5, rank 2, float64>": LowRank(np.ones((5, 2))),
    "LowRank<5, rank 2, float32>": LowRank(torch.ones(5, 2), torch.ones(2), torch.ones(5, 2)),
    "Eigenbasis<3, float64>": Eigenbasis(np.eye(3), np.ones(3)),
    "Eigenbasis<6, float64>": Eigenbasis(Kronecker(np.eye(2), np.eye(3)), np.ones(6)),
}


@pytest.mark.parametrize("shown", LEAVES)
def test_printing_size_and_spaces(shown: str) -> None:
    leaf = LEAVES[shown]
    assert str(leaf) == repr(leaf) == shown
    assert str(2 * leaf + Identity) == f"2*{shown} + identity"
    assert (leaf.domain, leaf.codomain) == ("parameters", "parameters")
    assert leaf.size == int(shown.split("<")[1].split(",")[0].replace("2 x 3", "6"))
    assert all(array.dtype == leaf.arrays[0].dtype for array in leaf.arrays)
    assert leaf._repr_latex_().startswith(rf"$\mathrm{{{type(leaf).__name__}}}_{{")


@pytest.mark.parametrize("shown", LEAVES)
def test_leaves_compare_by_token(shown: str) -> None:
    leaf = LEAVES[shown]
    for twin in (pickle.loads(pickle.dumps(leaf)), copy.copy(leaf), copy.deepcopy(leaf)):
        assert twin == leaf
        assert hash(twin) == hash(leaf)
        assert twin.token == leaf.token
        assert [np.asarray(a).tolist() for a in twin.arrays] == [np.asarray(a).tolist() for a in leaf.arrays]
    assert len({str(leaf): leaf, **LEAVES}.values()) == len(LEAVES)
    assert len(set(LEAVES.values())) == len(LEAVES)


def test_equal_numbers_are_not_equal_leaves() -> None:
    assert Diagonal(np.ones(3)) != Diagonal(np.ones(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Diagonal([1.0, 2.0]), "torch tensor or a NumPy array, got list"),
        (lambda: Diagonal(np.eye(2)), r"values must be 1-d, got shape \(2, 2\)"),
        (lambda: Kronecker(), "at least one factor"),
        (lambda: Kronecker(np.eye(2), np.ones((2, 3))), "factor 1 must be square"),
        (lambda: Kronecker(np.ones(3)), "factor 0 must be 2-d"),
        (lambda: LowRank(np.ones(3)), "left must be 2-d"),
        (lambda: LowRank(np.ones((5, 2)), np.ones(3)), r"core must be \(2,\) or \(2, 2\)"),
        (lambda: LowRank(np.ones((5, 2)), np.ones((2, 3))), "core must be"),
        (lambda: LowRank(np.ones((5, 2)), None, np.ones((4, 2))), r"left's shape \(5, 2\)"),
        (lambda: Eigenbasis(np.eye(3), np.ones(2)), "3 columns but there are 2 values"),
        (lambda: Eigenbasis(Kronecker(np.eye(2), np.eye(2)), np.ones(3)), "4 columns"),
        (lambda: Eigenbasis(np.ones((3, 2)), np.ones(2)), "square"),
        (lambda: Eigenbasis(Diagonal(np.ones(3)), np.ones(3)), "basis must be a torch tensor"),
    ],
)
def test_wrong_arrays(make: Any, message: str) -> None:
    with pytest.raises(ExpressionError, match=message):
        make()


@pytest.mark.parametrize("lib", [np.array, torch.tensor])
def test_facts(lib: Any) -> None:
    definite, semi, mixed = lib([1.0, 2.0]), lib([0.0, 1.0]), lib([-1.0, 1.0])
    eye, skew = lib([[1.0, 0.0], [0.0, 1.0]]), lib([[0.0, 1.0], [-1.0, 0.0]])
    for make in (Diagonal, lambda values: Eigenbasis(eye, values)):
        assert make(definite).facts() == Facts(positive_definite=True)
        assert make(semi).facts() == Facts(psd=True, positive_definite=False)
        assert make(mixed).facts() == Facts(symmetric=True, psd=False)
    assert Kronecker(eye, eye).facts() == Facts(symmetric=True)
    assert Kronecker(eye, skew).facts() == Facts()
    assert LowRank(skew).facts() == Facts(psd=True)
    assert LowRank(skew, definite).facts() == Facts(psd=True)
    assert LowRank(skew, mixed).facts() == Facts(symmetric=True)
    assert LowRank(skew, eye).facts() == Facts(symmetric=True)
    assert LowRank(skew, skew).facts() == Facts()
    assert LowRank(skew, None, eye).facts() == Facts()


def test_rounding_does_not_take_symmetry_away():
    half = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    gram = half @ half.T
    skewed = gram + gram.abs().max() * 1e-5 * torch.randn(40, 40).triu(1)
    assert Kronecker(gram, gram.double()).facts().symmetric is True
    assert Kronecker(gram, skewed).facts().symmetric is None
    off = gram.double().clone()
    off[3, 7] += 1e-7 * float(gram.abs().max())
    assert Kronecker(off).facts().symmetric is None


@pytest.mark.parametrize(
    "kind", [np.ones, lambda shape: torch.ones(shape, dtype=torch.float64)], ids=["numpy", "torch"]
)
@pytest.mark.parametrize(
    ("leaf", "shapes"),
    [
        (Diagonal, [(3,)]),
        (Kronecker, [(2, 2), (3, 3)]),
        (LowRank, [(5, 2), (2, 2), (5, 2)]),
        (Eigenbasis, [(3, 3), (3,)]),
        (lambda a, b, values: Eigenbasis(Kronecker(a, b), values), [(2, 2), (3, 3), (6,)]),
    ],
)
def test_a_leaf_stays_what_it_is_when_its_arrays_are_written_into(leaf: Any, shapes: Any, kind: Any) -> None:
    arrays = [kind(shape) for shape in shapes]
    made = leaf(*arrays)
    for array in arrays:
        array *= 2
    assert all(bool((array == 1).all()) for array in made.arrays)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_arrays_that_are_not_finite_are_refused_by_name(bad, kind):
    square, column = torch.eye(3), torch.ones(3, 1)
    square[1, 2], column[2, 0] = bad, bad
    values = column[:, 0]
    if kind == "numpy":
        square, column, values = square.numpy(), column.numpy(), values.numpy()
    for make, name in (
        (lambda: Diagonal(values), "values"),
        (lambda: Kronecker(np.eye(2), square), "Kronecker factor 1"),
        (lambda: LowRank(column), "left"),
        (lambda: Eigenbasis(np.eye(3), values), "values"),
        (lambda: Eigenbasis(square, np.ones(3)), "basis"),
    ):
        with pytest.raises(NotFiniteError, match=f"{name} must be finite.*nan_to_num"):
            make()


def test_arrays_of_whole_numbers_and_of_nothing_are_finite():
    assert Diagonal(np.arange(3)).size == 3
    assert Diagonal(torch.zeros(0)).size == 0
    assert Diagonal(torch.tensor([-3e38, 3e38])).size == 2


def test_arrays_that_require_gradients_are_taken_without_a_warning() -> None:
    """Which are errors here; torch warns once in a process if it is left alone."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        A = torch.tensor([[2.0, 1.0 + 1e-7], [1.0, 2.0]], requires_grad=True)  # symmetric up to rounding
        leaves = Diagonal(A[0]), Kronecker(A, A), LowRank(A, A), Eigenbasis(torch.eye(2, requires_grad=True), A[0])
        assert all(leaf.facts().symmetric for leaf in leaves)
    finally:
        torch.set_warn_always(before)


def test_arrays_without_numbers_are_taken_for_their_shape() -> None:
    values = torch.ones(3, device="meta")
    assert str(Diagonal(values)) == "Diagonal<3, float32>"
    assert str(Kronecker(values[:, None] * values)) == "Kronecker<3, float32>"
    assert str(LowRank(values[:, None])) == "LowRank<3, rank 1, float32>"

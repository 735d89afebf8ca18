"""Leaves made by laws: equal whenever they are made, of the same numbers as the expression, and never in place."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from curvalg import Identity, inverse
from curvalg.expr import ArrayLeaf, Diagonal, Eigenbasis, Expr, Facts, Kronecker, LowRank, Product, Sum
from curvalg.rewrite import simplify
from tests.support.worlds import GROUPS, A, D, DenseWorld, E, K, L, P, R, U, V, X, Y

WORLD = DenseWorld(GROUPS, outputs=4)
MADE: dict[str, tuple[Expr, Expr]] = {  # the same matrix, written in two ways that must become one leaf
    "transpose of Kronecker": (K.T, (K.T.T).T),
    "transpose of low rank": (R.T, (2 * R.T) / 2),
    "product of Kroneckers": (K @ L @ K, (K @ L) @ K),
    "sum of diagonals": (2 * D - E, -E + 2 * D),
    "scaled diagonal": (D / 3, -(-2 * D) / 6),
    "product of diagonals": (D @ E @ D, E @ D @ D),
    "shifted eigenbasis": (U + 3 * Identity, 3 * Identity + 2 * U / 2),
    "sum of eigenbases": (2 * X - Y + Identity, Identity - Y + 2 * X),
    "product of eigenbases": (U @ V, V @ U),
}


@pytest.mark.parametrize("what", MADE)
def test_leaves_that_laws_make_are_equal_each_time(what: str) -> None:
    one, other = MADE[what]
    leaf = simplify(one).expr
    assert isinstance(leaf, ArrayLeaf)
    assert leaf == simplify(one).expr == simplify(other).expr == simplify(pickle.loads(pickle.dumps(one))).expr
    assert hash(leaf) == hash(simplify(other).expr)
    twin = pickle.loads(pickle.dumps(leaf))
    assert (twin, twin.T, twin.facts()) == (leaf, leaf.T, leaf.facts())
    assert leaf not in (D, E, K, L, R, U, V, X, Y)
    np.testing.assert_allclose(WORLD.value(leaf), WORLD.value(other), atol=1e-12)


def test_step_by_step_gives_what_at_once_gives() -> None:
    assert simplify((2 * D + E).simplify() - D / 3).expr == simplify(D * Fraction(5, 3) + E).expr
    assert simplify(K @ (L @ K).simplify()).expr == simplify((K @ L).simplify() @ K).expr == simplify(K @ L @ K).expr
    assert simplify((U + V).simplify() + 2 * Identity).expr == simplify(V + 2 * Identity + U).expr
    assert simplify(K.T).expr.T is K


def test_different_operations_give_different_leaves() -> None:
    made = [D + E, D - E, D @ E, 2 * D, -D, K.T, K @ L, L @ K, U + V, U @ V, U + Identity, U - Identity, X + Identity]
    assert len({simplify(expr).expr for expr in made}) == len(made)


TORCH: dict[str, Callable[[Any], Expr]] = {
    "diagonals": lambda a: 2 * Diagonal(a(3)) - Diagonal(a(3)) / 3,
    "product of diagonals": lambda a: Diagonal(a(3)) @ Diagonal(a(3)),
    "Kroneckers": lambda a: Kronecker(a(2, 2), a(3, 3)).T @ Kronecker(a(2, 2), a(3, 3)),
    "low rank": lambda a: LowRank(a(5, 2), a(2, 2), a(5, 2)).T,
    "low rank of one side": lambda a: LowRank(a(5, 2), a(2, 2)).T,
    "low rank with a diagonal core": lambda a: LowRank(a(5, 2), a(2), a(5, 2)).T,
    "eigenbasis": lambda a: 3 * Eigenbasis(torch.linalg.qr(a(3, 3))[0], a(3)) - Identity / 2,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("what", TORCH)
def test_torch_tensors_stay_torch_tensors_of_their_dtype(what: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    expr = TORCH[what](lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype))
    leaf = simplify(expr).expr
    assert isinstance(leaf, ArrayLeaf)
    assert {(type(array), array.dtype) for array in leaf.arrays} == {(torch.Tensor, dtype)}
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    world = DenseWorld({"w": range(leaf.size)}, outputs=1)
    np.testing.assert_allclose(world.value(leaf), world.value(expr), atol=tolerance)


def test_arrays_are_not_written_into() -> None:
    leaves = (D, E, K, L, R, U, V, X, Y)
    before = [array.copy() for leaf in leaves for array in leaf.arrays]
    for one, other in MADE.values():
        simplify(one), simplify(other), simplify(inverse(one @ other + P))
    after = [array for leaf in leaves for array in leaf.arrays]
    assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))


ONES = np.ones(3)
APART: dict[str, Expr] = {
    "torch and NumPy": Diagonal(ONES) + Diagonal(torch.ones(3, dtype=torch.float64)),
    "two precisions": Diagonal(ONES) + Diagonal(ONES.astype("float32")),
    "two sizes": Diagonal(ONES) + Diagonal(np.ones(4)),
    "integers": 2 * Diagonal(np.arange(3)) + Diagonal(np.arange(3)),
    "half precision": 2 * Diagonal(ONES.astype("float16")),
    "two devices": Diagonal(torch.ones(3)) + Diagonal(torch.ones(3, device="meta")),
    "out of range": 10**40 * Diagonal(ONES) + Diagonal(ONES),
    "beyond all floats": Diagonal(ONES) / 10**400 + Diagonal(ONES),
    "product of two kinds": Diagonal(ONES) @ Diagonal(torch.ones(3)),
    "factors of other sizes": Kronecker(np.eye(2), np.eye(3)) @ Kronecker(np.eye(3), np.eye(2)),
    "two bases": Eigenbasis(np.eye(3), ONES) + Eigenbasis(np.eye(3)[[1, 0, 2]], ONES),
    "a shift between two bases": U + X + Identity,
    "a shift beside something else": U + A + Identity,
    "a shift beside a diagonal": D + Identity,
    "product of two bases": U @ X,
}


@pytest.mark.parametrize("what", APART)
def test_what_does_not_fit_is_left_alone(what: str) -> None:
    assert simplify(APART[what]).expr == APART[what]


def test_leaves_of_one_kind_are_merged_beside_those_of_another() -> None:
    here, there = Diagonal(ONES), Diagonal(torch.ones(3))
    total = simplify(here + 2 * there + 3 * Diagonal(ONES)).expr
    assert isinstance(total, Sum)
    assert [type(part.values) for part in total.coefficients] == [np.ndarray, torch.Tensor]
    assert [part.values[0] for part in total.coefficients] == [4, 2]


def test_what_is_known_of_a_product_is_not_lost_with_its_factors() -> None:
    semidefinite = Facts(psd=True)
    for gram in (
        K.T @ K,
        K.T @ L.T @ L @ K,
        (L @ K).T @ (L @ K),
        K.T @ P @ K,
        (K @ L).T @ P @ L.T.T @ P @ L @ P @ K @ L,
    ):
        if (known := gram.facts()).psd:
            assert simplify(gram).expr.facts().psd
        assert known in (semidefinite, Facts())
    assert simplify(K.T @ K).expr.facts() == simplify(K.T @ P @ K).expr.facts() == semidefinite
    assert simplify(L.T @ K.T @ P @ K @ L).expr.facts() == semidefinite
    assert isinstance(simplify(K.T @ P @ K).expr, Product)
    assert simplify(R.T @ P @ R).expr.facts() == semidefinite

"""Expressions are frozen, hashable, and survive copying and pickling, into other processes too."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from curvalg.expr import (
    GGN,
    Block,
    BlockDiagonal,
    Diagonal,
    Expr,
    Hessian,
    Identity,
    Jacobian,
    MonteCarloGGN,
    Zero,
    block_diagonal,
    diagonal_part,
    inv_sqrt,
    inverse,
    nystrom,
    restrict,
    sqrt,
)
from tests.support.strategies import expressions

EVERY = [
    GGN(),
    MonteCarloGGN(samples=3),
    Identity,
    Zero,
    GGN() + 2 * Identity,
    GGN() @ Hessian(),
    Jacobian().T,
    inverse(GGN(), rtol=0.1),
    restrict(GGN(), "w"),
    block_diagonal(GGN()),
    block_diagonal([Block(("w",), GGN(), joint=True)]),
    BlockDiagonal((Block(("w",), GGN()),), None, complete=True),
    sqrt(GGN()),
    inv_sqrt(GGN()),
    diagonal_part(GGN()),
    nystrom(GGN(), 2),
    nystrom(GGN(), 2, seed=1),
    Diagonal(np.ones(3)),
]


@pytest.mark.parametrize("expr", EVERY, ids=str)
def test_nothing_can_be_set_or_deleted(expr: Expr) -> None:
    for name in vars(expr):
        with pytest.raises(AttributeError):
            setattr(expr, name, None)
        with pytest.raises(AttributeError):
            delattr(expr, name)


def test_the_coefficients_of_a_sum_cannot_be_written() -> None:
    expr = GGN() + 2 * Identity
    with pytest.raises(TypeError):
        expr.coefficients[Hessian()] = 1  # type: ignore[attr-defined]


@settings(max_examples=80, deadline=None)
@given(expressions())
def test_copies_are_equal(expr: Expr) -> None:
    for twin in (copy.copy(expr), copy.deepcopy(expr), pickle.loads(pickle.dumps(expr))):
        assert twin == expr
        assert hash(twin) == hash(expr)
        assert str(twin) == str(expr)
        assert len({twin, expr}) == 1


@settings(max_examples=80, deadline=None)
@given(expressions())
def test_rebuilding_over_the_same_children_changes_nothing(expr: Expr) -> None:
    assert expr.rebuild(expr.children) == expr


def test_different_expressions_differ() -> None:
    assert len(set(EVERY)) == len(EVERY)
    assert MonteCarloGGN(samples=2) != MonteCarloGGN(samples=3)
    assert inverse(GGN()) != inverse(GGN(), solver="cg")
    assert GGN() != "ggn"
    assert GGN() + Hessian() != "ggn + hessian"


SCRIPT = """
import pickle, sys
exprs = pickle.load(sys.stdin.buffer)
table = {expr: str(expr) for expr in exprs}
again = [expr.rebuild(expr.children) for expr in exprs]
assert [table[expr] for expr in again] == [str(expr) for expr in exprs], "hashes were carried over"
from curvalg.expr import GGN, Hessian, Identity
assert table[2 * Identity + GGN() / 3 + Hessian()]
sys.stdout.buffer.write(pickle.dumps(exprs))
"""


@pytest.mark.parametrize("seed", ["1", "2"])
def test_pickles_cross_processes_with_other_hash_seeds(seed: str) -> None:
    leaf = Diagonal(np.arange(3.0))
    exprs = [GGN() / 3 + Hessian() + 2 * Identity, *EVERY, inverse(leaf + Identity) @ leaf]
    root = str(Path(__file__).parents[2])
    back = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=pickle.dumps(exprs),
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    twins = pickle.loads(back)
    assert twins == exprs
    assert [hash(twin) for twin in twins] == [hash(expr) for expr in exprs]
    np.testing.assert_array_equal(twins[-1].factors[-1].values, leaf.values)

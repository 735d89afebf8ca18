"""Every law holds numerically on its witnesses, fires on them, and rewriting ends in one form."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st

from curvalg import ExpressionError, Identity, inverse, restrict
from curvalg.expr import (
    GGN,
    Block,
    BlockDiagonal,
    DiagonalPart,
    Expr,
    Hessian,
    Jacobian,
    Kronecker,
    LossHessian,
    LowRank,
    Product,
    Sum,
    diagonal_part,
    multiply,
    sqrt,
    transpose,
)
from curvalg.rewrite import LAWS, Law, rewrite, simplify
from tests.support import witness
from tests.support.strategies import expressions
from tests.support.worlds import GROUPS, A, B, DenseWorld, P, S, sums_of_blocks, valued

WORLD = DenseWorld(GROUPS, outputs=4)
WITNESSES = [(law, w) for law in LAWS for w in law.witnesses(witness)]


@pytest.mark.parametrize(("law", "witness"), WITNESSES, ids=[f"{law.name}: {w}" for law, w in WITNESSES])
def test_law_fires_and_holds(law, witness):
    result = rewrite(witness, [law], law.loss)
    assert [step.law for step in result.steps], "the law does not fire on its witness"
    if "fisher_mc" in str(witness):
        assert result.expr.samples == witness.samples
    np.testing.assert_allclose(WORLD.value(result.expr), WORLD.value(witness), rtol=1e-8, atol=1e-10)


def test_every_law_has_a_witness():
    assert all(list(law.witnesses(witness)) for law in LAWS)
    assert len({law.name for law in LAWS}) == len(LAWS)


def test_a_wrong_law_is_caught():
    wrong = Law(
        "wrong",
        "(A @ B).T = A.T @ B.T",
        Expr,
        lambda e, _: A.T @ B.T if e == (A @ B).T else None,
        lambda w: [(A @ B).T],
    )
    result = rewrite((A @ B).T, [wrong])
    assert not np.allclose(WORLD.value(result.expr), WORLD.value((A @ B).T))


def _reversed_blocks(expr):
    params = [block.params for block in expr.what][::-1]
    blocks = tuple(Block(p, b.expr, joint=b.joint) for p, b in zip(params, expr.what))
    return BlockDiagonal(blocks, None, expr.complete)


SLIPS = {
    "inverse of a product": lambda e: multiply(e.factors[::-1]) if isinstance(e, Product) else e,
    "transpose of a Kronecker product": lambda e: (
        Kronecker(*(f.T for f in e.factors)) if isinstance(e, Kronecker) else e
    ),
    "transpose of low rank": lambda e: LowRank(e.right, e.core.T, e.left),
    "product of Kronecker products": lambda e: e.T if isinstance(e, Kronecker) else e,
    "sum of diagonals": lambda e: e - 2 * e.shift * Identity if isinstance(e, Sum) else e,
    "sum in one eigenbasis": lambda e: 2 * e,
    "square of a root": lambda e: e @ sqrt(P) if isinstance(e, Product) else sqrt(e),
    "sum over one partition": lambda e: _reversed_blocks(e) if isinstance(e, BlockDiagonal) and e.by is None else e,
    "sum over different partitions": lambda e: e + Identity,
    "shift of blocks": lambda e: BlockDiagonal(e.what + Identity, e.by) if e.by else e,
    "diagonal part of blocks": lambda e: diagonal_part(2 * e.expr) if isinstance(e, DiagonalPart) else e,
    "nested blocks": lambda e: BlockDiagonal(e.what[:-1], None),
}


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_in_a_law_is_caught_by_its_witnesses(name):
    law = next(law for law in LAWS if law.name == name)
    slip = SLIPS[name]
    values = [
        (WORLD.value(w), WORLD.value(slip(right)))
        for w in law.witnesses(witness)
        if (right := law.right(w, law.loss)) is not None
    ]
    assert values
    assert not all(np.allclose(value, wrong) for value, wrong in values)


def test_laws_that_undo_each_other_are_an_error():
    there = Law("there", "A = B", Expr, lambda e, _: B if e == A else None, lambda w: [])
    back = Law("back", "B = A", Expr, lambda e, _: A if e == B else None, lambda w: [])
    with pytest.raises((ExpressionError, RecursionError)):
        rewrite(A + Identity, [there, back])


def simplified(expr: Expr, laws=LAWS) -> Expr:
    """The normal form; random expressions may turn out to have no meaning, as the root of what is negative."""
    try:
        return rewrite(expr, laws).expr
    except ExpressionError as error:
        assert "laws do not terminate" not in str(error)
        reject()


@settings(max_examples=150, deadline=None)
@given(expressions())
def test_simplification_ends_and_is_idempotent(expr):
    once = simplified(expr)
    assert simplify(once).expr == once
    assert (once.domain, once.codomain) == (expr.domain, expr.codomain)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(valued() | sums_of_blocks())
def test_simplification_keeps_the_value(expr):
    once = simplified(expr)
    assert simplify(once).expr == once
    before, after = WORLD.value(expr), WORLD.value(once)
    assume(np.isfinite(before).all() and np.abs(before).max() < 1e6)
    np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6 * max(1.0, np.abs(before).max()))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(expressions() | valued() | sums_of_blocks(), st.randoms())
def test_the_order_of_the_laws_does_not_count(expr, random):
    assert simplified(expr, random.sample(LAWS, len(LAWS))) == simplified(expr)


@settings(max_examples=100, deadline=None)
@given(valued() | sums_of_blocks())
def test_simplifying_twice_gives_equal_expressions(expr):
    once = simplified(expr)
    assert simplify(pickle.loads(pickle.dumps(expr))).expr == simplify(expr).expr == once
    assert pickle.loads(pickle.dumps(once)) == once


def test_what_rebuilding_makes_is_rewritten_too():
    J, L, H = Jacobian(), LossHessian(), Hessian()
    assert simplify((L @ J @ H).T @ (2 * J.T).T).expr == 2 * H @ GGN()
    assert simplify(H @ (3 * (J.T @ L)).T.T @ J.T.T).expr == 3 * H @ GGN()


def test_zeros_of_every_restriction_keep_their_shape():
    J, L = Jacobian(), LossHessian()
    half = restrict(J, "a").T @ (L - L) @ J
    for expr, shape in [
        (half, (2, 6)),
        (half.T, (6, 2)),
        (restrict(J - J, "b"), (4, 1)),
        (restrict(A - A, "a"), (2, 2)),
        ((restrict(A - A, "a") + 2 * Identity).T, (2, 2)),
        (restrict(J, "a").T @ restrict(J - J, "b"), (2, 1)),
    ]:
        assert WORLD.value(expr).shape == shape
        np.testing.assert_array_equal(WORLD.value(simplify(expr).expr), WORLD.value(expr))


def test_sums_whose_parts_cancel_are_transposed_with_their_space():
    shift = A - A + 2 * Identity
    assert simplify(shift.T).expr == shift.transposed(transpose) == shift
    left = A - A + inverse(2 * Identity)
    assert left.transposed(transpose).domain == "parameters"
    assert simplify(left.T).expr.domain == "parameters"


def test_nested_rewriting_reaches_the_bottom():
    assert simplify(((S @ A).T + 2 * (A @ B).T).T).expr == S @ A + 2 * (A @ B)

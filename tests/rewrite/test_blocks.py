"""Sums, products and shifts of block-diagonals: one normal form, whatever the order, sign and scale."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from curvalg import Identity, Zero, inverse, restrict
from curvalg.expr import Block, BlockDiagonal, Expr, Kronecker, Sum, block_diagonal, sqrt
from curvalg.rewrite import simplify
from tests.support.worlds import GROUPS, A, B, DenseWorld, P, Q, S, blocks, sums_of_blocks

WORLD = DenseWorld(GROUPS, outputs=4)
K = Kronecker(np.diag([1.0, 2.0]), np.eye(3))
KFAC = blocks((["a", "b"], P), (["m.w", "m.b"], Q), joint=True)


def same(*exprs: Expr) -> Expr:
    """The one normal form of several expressions."""
    first, *others = [simplify(expr).expr for expr in exprs]
    assert all(other == first for other in others), [first, *others]
    np.testing.assert_allclose(WORLD.value(first), WORLD.value(exprs[0]), atol=1e-10)
    return first


def test_a_damping_per_group_keeps_the_structure_of_every_block() -> None:
    damping = blocks((["a", "b"], 0.1 * Identity), (["m.w"], Identity / 4), (["m.b"], Identity / 4))
    total = same(KFAC + damping, damping + KFAC, 2 * (KFAC / 2) - -damping)
    assert total == blocks((["a", "b"], P + 0.1 * Identity), (["m.w", "m.b"], Q + Identity / 4), joint=True)
    assert total.facts().positive_definite


def test_a_damping_that_differs_within_a_joint_block_is_added_by_name() -> None:
    damping = blocks((["a", "b", "m.w"], Identity), (["m.b"], 2 * Identity))
    joint = [Block(("a", "b"), P + Identity, joint=True)]
    inner = blocks((["m.w"], Identity), (["m.b"], 2 * Identity)) + blocks((["m.w", "m.b"], Q), joint=True)
    expected = BlockDiagonal((*joint, Block(("m.b", "m.w"), inner)), None, complete=True)
    assert same(KFAC + damping, damping + KFAC) == expected


def test_blocks_with_a_shift_are_one_expression() -> None:
    for made in (KFAC, block_diagonal(P), block_diagonal(P, by="module")):
        total = same(made + 2 * Identity, 2 * Identity + made, (4 * made) / 4 + 2 * Identity, 2 * (made / 2 + Identity))
        assert isinstance(total, BlockDiagonal)
        assert total.facts().positive_definite


def test_a_shift_stays_outside_where_blocks_leave_parameters_out_or_are_not_alone() -> None:
    partly, groups = block_diagonal({"a": P}), block_diagonal(P, by=[["a"], ["b"]])
    for total in (partly + Identity, groups + Identity, KFAC + A + Identity, block_diagonal(P) + KFAC + Identity):
        simplified = same(total)
        assert isinstance(simplified, Sum)
        assert simplified.shift == 1


def test_what_cancels_is_zero() -> None:
    assert same(KFAC - KFAC.T) == KFAC - KFAC
    assert same(block_diagonal(A).T - block_diagonal(A.T) + block_diagonal(2 * Identity)) == A - A + 2 * Identity
    left = same(blocks((["a", "b"], A), (["m.w", "m.b"], S)) - blocks((["b", "a"], B), (["m.b", "m.w"], S)))
    assert left.facts().symmetric is None


def test_matrices_in_different_layouts_are_not_added_entry_by_entry() -> None:
    plain = blocks((["a", "b"], A), (["m.w", "m.b"], B))
    turned = blocks((["b", "a"], A), (["m.w", "m.b"], B), joint=True)
    fine = blocks((["a"], A), (["b"], B), (["m.w", "m.b"], 2 * Identity))
    finer = blocks((["a", "b"], Identity), (["m.w"], A), (["m.b"], B))
    for parts in itertools.combinations([KFAC, plain, turned, fine, finer], 3):
        total = same(*(sum(order[1:], order[0]) for order in itertools.permutations(parts)))
        assert isinstance(total, BlockDiagonal)
        assert not any(block.joint and _by_name(block.expr) for block in total.what)


def _by_name(expr: Expr) -> bool:
    return isinstance(expr, BlockDiagonal) or any(map(_by_name, expr.children))


def test_partitions_that_nothing_joins_are_left_alone() -> None:
    one, other = blocks((["a", "b"], A), (["m.w", "m.b"], B)), blocks((["a"], S), (["b", "m.w"], P), (["m.b"], S))
    assert same(one + other) == one + other
    third = blocks((["a", "b", "m.w", "m.b"], K))
    assert same(one + other + third) == blocks((["a", "b", "m.w", "m.b"], K + one + other))


def test_multiples_in_every_block_are_a_multiple() -> None:
    assert same(blocks((["a", "b"], Identity), (["m.w", "m.b"], Identity)) + KFAC - KFAC.T) == A - A + Identity
    assert same(block_diagonal({"a": Zero, "b": A - A})) == A - A
    partly = block_diagonal({"a": 2 * Identity, "b": 2 * Identity})
    assert same(partly) == partly


def test_products_and_roots_of_blocks_are_blocks() -> None:
    assert same(KFAC @ KFAC) == blocks((["a", "b"], P @ P), (["m.w", "m.b"], Q @ Q), joint=True)
    assert same(sqrt(KFAC) @ sqrt(KFAC)) == KFAC
    whole = block_diagonal(A) @ block_diagonal(B)
    assert same(whole) == whole
    one, other = block_diagonal({"a": A, "b": B}), block_diagonal([Block(("b",), B), Block(("a",), S, joint=True)])
    assert same(one @ other) == one @ other


def test_blocks_over_different_restrictions_are_left_alone() -> None:
    one, other = block_diagonal({"a": restrict(A, "a")}), block_diagonal({"a": B})
    assert same(one + 2 * other) == one + block_diagonal({"a": 2 * B})
    assert same(one @ other) == one @ other


def test_inverses_of_blocks_are_left_to_the_solvers() -> None:
    assert same(inverse(KFAC + Identity)) == inverse(simplify(KFAC + Identity).expr)


@settings(max_examples=100, deadline=None)
@given(sums_of_blocks(), st.randoms())
def test_operand_order_sign_and_scale_do_not_count(total: Expr, random) -> None:
    pairs = list(total.coefficients.items()) if isinstance(total, Sum) else [(total, 1)]
    pairs += [(Identity, total.shift)] if isinstance(total, Sum) else []
    random.shuffle(pairs)
    other = -sum((-4 * c * part for part, c in pairs), Zero) / -4
    assert simplify(-other).expr == simplify(total).expr

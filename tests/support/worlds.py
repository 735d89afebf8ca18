"""Hypothesis strategies of expressions with a dense value: over the parameters of the laws' witnesses, every kind of node."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
from hypothesis import strategies as st

from curvalg.expr import (
    Block,
    BlockDiagonal,
    Diagonal,
    Eigenbasis,
    Expr,
    Identity,
    Kronecker,
    LowRank,
    Zero,
    block_diagonal,
    diagonal_part,
    inv_sqrt,
    inverse,
    nystrom,
    restrict,
    sqrt,
)
from tests.support.witness import GROUPS, A, B, D, DenseWorld, E, K, L, P, Q, R, S, U, V, X, Y, blocks

__all__ = [
    "A",
    "B",
    "D",
    "DenseWorld",
    "E",
    "GROUPS",
    "K",
    "L",
    "P",
    "Q",
    "R",
    "S",
    "U",
    "V",
    "X",
    "Y",
    "blocks",
    "leaves",
    "sums_of_blocks",
    "valued",
]

Names = tuple[str, ...]
scales = st.sampled_from([1, 1, 2, -1, -3, 0.5, 1 / 3])


@functools.cache
def leaves(size: int) -> list[Expr]:
    """Array leaves of one size, two of each kind that close under sums or products."""
    random = np.random.default_rng(size)

    def numbers(*shape: int) -> np.ndarray:
        return random.standard_normal(shape)

    small = 2 if size % 2 == 0 else 1
    basis = np.linalg.qr(numbers(size, size))[0]
    factors = [np.linalg.qr(numbers(n, n))[0] for n in (small, size // small)]
    kronecker, symmetric = Kronecker(*factors), numbers(small, small)
    symmetric += symmetric.T
    return [
        *(Diagonal(numbers(size)) for _ in range(2)),
        *(Kronecker(numbers(small, small), numbers(size // small, size // small)) for _ in range(2)),
        Kronecker(symmetric, np.eye(size // small)),
        LowRank(numbers(size, 1)),
        LowRank(numbers(size, 2), numbers(2, 2), numbers(size, 2)),
        *(Eigenbasis(basis, numbers(size)) for _ in range(2)),
        *(Eigenbasis(kronecker, numbers(size)) for _ in range(2)),
    ]


@st.composite
def valued(draw: st.DrawFn, *, depth: int = 3) -> Expr:
    """Expressions over the parameters of GROUPS."""
    grammar, scope = _Grammar(draw), tuple(GROUPS)
    if draw(st.integers(0, 3)):
        return grammar.expression(scope, depth)
    names = draw(st.sampled_from([("a",), ("m.b", "a"), ("b", "m.w", "a")]))
    parts = [draw(scales) * restrict(grammar.expression(scope, depth - 1), names) for _ in range(2)]
    return draw(st.sampled_from([parts[0] + parts[1] + Identity, parts[0] @ parts[1].T, diagonal_part(parts[0])]))


@st.composite
def sums_of_blocks(draw: st.DrawFn) -> Expr:
    """Sums of complete block-diagonals, with a shift and something else at times."""
    grammar = _Grammar(draw)
    scope = tuple(GROUPS)
    parts = [draw(scales) * grammar.complete(scope, 1) for _ in range(draw(st.integers(2, 4)))]
    others = [draw(scales) * Identity, grammar.leaf(scope, 0), grammar.whole(scope, 0)]
    parts += [other for other in others if draw(st.integers(0, 2)) == 0]
    return functools.reduce(lambda a, b: a + b, draw(st.permutations(parts)))


class _Grammar:
    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw

    def expression(self, scope: Names, depth: int) -> Expr:
        """An operator on the parameters of a scope: all, or those of a block."""
        rules = ["leaf", "leaf"]
        if depth > 0:
            rules += ["sum", "sum", "product", "product", "transpose", "inverse", "root", "diagonal", "nystrom"]
            rules += ["whole", "given", "complete", "complete", "submatrices"]
        rule: Callable[[Names, int], Expr] = getattr(self, self.draw(st.sampled_from(rules)))
        return rule(scope, depth - 1)

    def leaf(self, scope: Names, depth: int) -> Expr:
        size = sum(len(GROUPS[name]) for name in scope)
        return self.draw(st.sampled_from([A, B, S, P, Q, Identity, Zero, *leaves(size)]))

    def sum(self, scope: Names, depth: int) -> Expr:
        parts = [self.draw(scales) * self.expression(scope, depth) for _ in range(self.draw(st.integers(2, 3)))]
        return functools.reduce(lambda a, b: a + b, [*parts, self.draw(st.sampled_from([0, 0, 1, -2])) * Identity])

    def product(self, scope: Names, depth: int) -> Expr:
        parts = [self.expression(scope, depth) for _ in range(self.draw(st.integers(2, 3)))]
        return functools.reduce(lambda a, b: a @ b, parts)

    def transpose(self, scope: Names, depth: int) -> Expr:
        return self.expression(scope, depth).T

    def positive(self, scope: Names, depth: int) -> Expr:
        inner = self.expression(scope, depth)
        return self.draw(
            st.sampled_from([inner.T @ inner + 2 * Identity, P, 2 * Q, 2.25 * Identity, P + inner.T @ inner])
        )

    def inverse(self, scope: Names, depth: int) -> Expr:
        left, right = self.positive(scope, depth), self.positive(scope, depth)
        return inverse(self.draw(st.sampled_from([left, -3 * left, left @ right, inverse(left)])))

    def root(self, scope: Names, depth: int) -> Expr:
        root = sqrt(self.positive(scope, depth))
        return self.draw(
            st.sampled_from([root, root @ root, root @ root @ root, inv_sqrt(self.positive(scope, depth))])
        )

    def diagonal(self, scope: Names, depth: int) -> Expr:
        return diagonal_part(self.expression(scope, depth))

    def nystrom(self, scope: Names, depth: int) -> Expr:
        return nystrom(self.positive(scope, depth), self.draw(st.integers(1, 2)), seed=self.draw(st.integers(0, 1)))

    def whole(self, scope: Names, depth: int) -> Expr:
        by = self.draw(st.sampled_from(["parameter", "module", [[scope[0]]], [list(scope[::-1])]]))
        return block_diagonal(self.expression(scope, depth), by=by)

    def given(self, scope: Names, depth: int) -> Expr:
        groups = self.partition(scope)
        return block_diagonal(self.blocks(groups[: self.draw(st.integers(1, len(groups)))], depth))

    def complete(self, scope: Names, depth: int) -> Expr:
        return BlockDiagonal(tuple(self.blocks(self.partition(scope), depth)), None, complete=True)

    def partition(self, scope: Names) -> list[Names]:
        names = self.draw(st.permutations(scope))
        cuts = [0, *sorted(self.draw(st.sets(st.integers(1, len(names))))), len(names)]
        return [tuple(names[i:j]) for i, j in zip(cuts, cuts[1:]) if i < j]

    def blocks(self, groups: Sequence[Names], depth: int) -> list[Block]:
        made = []
        for group in groups:
            expr = self.expression(group, depth) if self.draw(st.booleans()) else self.draw(scales) * Identity
            made.append(Block(group, expr, joint=self.draw(st.booleans())))
        return made

    def submatrices(self, scope: Names, depth: int) -> Expr:
        chosen = self.draw(st.sampled_from([(scope[0],), scope[::-1]]))
        parts = [self.draw(scales) * restrict(self.expression(chosen, depth), chosen) for _ in range(2)]
        return block_diagonal([Block(chosen, parts[0] + parts[1] + Identity)])

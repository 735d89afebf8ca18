"""Random expressions of every kind of node on a small network, each beside the same arithmetic on dense matrices.

What is drawn is a pair: an expression and its matrix by plain torch, from the dense matrices of the leaves alone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from curvalg import (
    Block,
    Diagonal,
    Eigenbasis,
    Expr,
    Identity,
    Kronecker,
    LowRank,
    Problem,
    Zero,
    block_diagonal,
    diagonal_part,
    inv_sqrt,
    inverse,
    nystrom,
    registry,
    restrict,
    sqrt,
)
from tests.support.nightly import NIGHTLY

Names = tuple[str, ...]
SHAPES = {"0.weight": (2, 3), "0.bias": (2,), "2.weight": (3, 2), "2.bias": (3,)}
ALL = tuple(SHAPES)
TOLERANCE = 1e-6
"""Of a solve by an iteration; everything else is far below."""


def _numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 100 * sum(shape)), dtype=torch.float64)


@functools.cache
def problem(names: Names = ALL) -> Problem:
    """A two-layer classifier on ragged batches, with some of its parameters chosen."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    for number, parameter in enumerate(model.parameters()):
        parameter.data = _numbers(*parameter.shape, seed=number)
    x, y = _numbers(7, 3), torch.tensor([0, 2, 1, 1, 0, 2, 2])
    return Problem(model, nn.CrossEntropyLoss(), [(x[:2], y[:2]), (x[2:], y[2:])], params=list(names))


@functools.cache
def dense(leaf: Expr, names: Names = ALL) -> Tensor:
    """The matrix of a leaf alone, over chosen parameters."""
    return leaf.lower(problem(names)).to_dense()


def size(names: Names) -> int:
    """Number of entries of some parameters."""
    return sum(torch.Size(SHAPES[name]).numel() for name in names)


def positions(names: Names, within: Names = ALL) -> list[int]:
    """Where parameters lie in a flat vector of some, in the order of the model."""
    starts = dict(zip(within, itertools.accumulate((size((name,)) for name in within), initial=0), strict=False))
    return [starts[name] + i for name in within if name in names for i in range(size((name,)))]


def by_rows(names: Names) -> list[int]:
    """Where the rows of [W | b] lie in the flat vector of a weight and its bias."""
    rows, columns = SHAPES[names[0]]
    return [i for row in range(rows) for i in [*range(row * columns, (row + 1) * columns), rows * columns + row]]


def moved(matrix: Tensor, order: list[int]) -> Tensor:
    """The rows and columns of a matrix in another order, or some of them."""
    return matrix[order][:, order]


def put(matrix: Tensor, order: list[int], n: int) -> Tensor:
    """A matrix at some rows and columns of a zero one."""
    result = torch.zeros(n, n, dtype=matrix.dtype)
    result[torch.tensor(order)[:, None], torch.tensor(order)[None]] = matrix
    return result


TERMS: list[Expr] = [
    registry.build(name, **options)
    for name, options in [
        *((name, {}) for name in ("hessian", "ggn", "fisher", "residual", "covariance", "centered_covariance")),
        ("ggn_mc", {"samples": 2}),
        *((name, {}) for name in ("ggn_class", "ggn_cross", "ggn_within", "ggn_same")),
        *((name, {}) for name in ("ggn_diagonal", "covariance_diagonal", "centered_covariance_diagonal")),
        *((name, {"joint": joint, "rest": "exact"}) for name in ("kfac", "ekfac", "foof") for joint in (True, False)),
        ("kfac", {"fisher": "empirical", "rest": "exact"}),
    ]
]
KRONECKER = [term for term in TERMS if str(term).startswith(("kfac", "ekfac", "foof"))]
JACOBIAN, LOSS_HESSIAN, NTK = (registry.build(name) for name in ("jacobian", "loss_hessian", "ntk"))
scales = st.sampled_from([1, 1, 1, 2, -1, -3, 0.5, 1 / 3])


@functools.cache
def arrays(n: int) -> list[tuple[Expr, Tensor]]:
    """Array leaves of one size, with their matrices."""
    small = next(k for k in (3, 2, 1) if n % k == 0)
    factors = [_numbers(k, k, seed=k) for k in (small, n // small)]
    bases = [torch.linalg.qr(factor)[0] for factor in factors]
    squares = [factor @ factor.T for factor in factors]
    basis, values, left, core = torch.linalg.qr(_numbers(n, n))[0], _numbers(n), _numbers(n, 2), _numbers(2, 2)
    other, right = _numbers(n, seed=1), _numbers(n, 2, seed=2)
    whole = torch.kron(*bases)
    return [
        (Diagonal(values), values.diag()),
        (Diagonal(other.square()), other.square().diag()),
        (Kronecker(*factors), torch.kron(*factors)),
        (Kronecker(*squares), torch.kron(*squares)),
        (LowRank(left), left @ left.T),
        (LowRank(left, core, right), left @ core @ right.T),
        (Eigenbasis(basis, values), basis * values @ basis.T),
        (Eigenbasis(Kronecker(*bases), other.square()), whole * other.square() @ whole.T),
    ]


@dataclass(frozen=True)
class Pair:
    """An expression and its dense matrix."""

    expr: Expr
    value: Tensor

    def __add__(self, other: Pair) -> Pair:
        return Pair(self.expr + other.expr, self.value + other.value)

    def __rmul__(self, scale: float) -> Pair:
        return Pair(scale * self.expr, scale * self.value)

    def __matmul__(self, other: Pair) -> Pair:
        return Pair(self.expr @ other.expr, self.value @ other.value)

    @property
    def T(self) -> Pair:
        return Pair(self.expr.T, self.value.T)

    def shifted(self, c: int) -> Pair:
        return Pair(self.expr + c * Identity, self.value + c * torch.eye(len(self.value)).double())


class _Grammar:
    """Draws pairs over the parameters of a scope, laid out flat or, for a weight and its bias, as [W | b]."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw

    def pair(self, scope: Names, joint: bool = False, depth: int = 3) -> Pair:
        rules = ["term", "kronecker", "array", "constant"]
        if depth > 0:
            rules += ["sum", "sum", "sum", "given", "given", "given", "whole", "whole"]
            rules += ["product", "transpose", "inverse", "root", "diagonal", "nystrom", "outputs"]
        rule: Callable[[Names, bool, int], Pair] = getattr(self, self.draw(st.sampled_from(rules)))
        return rule(scope, joint, depth - 1)

    # -- leaves -------------------------------------------------------------------------------------------------------

    def term(self, scope: Names, joint: bool, depth: int) -> Pair:
        return self._named(self.draw(st.sampled_from(TERMS)), scope, joint)

    def kronecker(self, scope: Names, joint: bool, depth: int) -> Pair:
        return self._named(self.draw(st.sampled_from(KRONECKER)), scope, joint)

    def _named(self, expr: Expr, scope: Names, joint: bool) -> Pair:
        value = dense(expr, scope)
        return Pair(expr, moved(value, by_rows(scope)) if joint else value)

    def array(self, scope: Names, joint: bool, depth: int) -> Pair:
        return Pair(*self.draw(st.sampled_from(arrays(size(scope)))))

    def constant(self, scope: Names, joint: bool, depth: int) -> Pair:
        c = self.draw(st.sampled_from([0, 1, 2]))
        return Pair(c * Identity if c else Zero, c * torch.eye(size(scope)).double())

    def outputs(self, scope: Names, joint: bool, depth: int) -> Pair:
        """Through output space: Jᵀ B J, Jᵀ (B + I)⁻¹ J, Jᵀ (J Jᵀ) J."""
        J, B = (Pair(leaf, dense(leaf, scope)) for leaf in (JACOBIAN, LOSS_HESSIAN))
        damped = B.shifted(1)
        inverted = Pair(inverse(damped.expr), torch.linalg.inv(damped.value))
        middle = self.draw(st.sampled_from([B, damped, inverted, J @ J.T, Pair(NTK, dense(NTK, scope))]))
        made = J.T @ middle @ J
        return Pair(made.expr, moved(made.value, by_rows(scope)) if joint else made.value)

    # -- arithmetic ---------------------------------------------------------------------------------------------------

    def sum(self, scope: Names, joint: bool, depth: int) -> Pair:
        parts = [self.draw(scales) * self.pair(scope, joint, depth) for _ in range(self.draw(st.integers(2, 3)))]
        return functools.reduce(lambda a, b: a + b, parts).shifted(self.draw(st.sampled_from([0, 0, 1, 2])))

    def product(self, scope: Names, joint: bool, depth: int) -> Pair:
        return self.pair(scope, joint, depth) @ self.pair(scope, joint, depth)

    def transpose(self, scope: Names, joint: bool, depth: int) -> Pair:
        return self.pair(scope, joint, depth).T

    def positive(self, scope: Names, joint: bool, depth: int) -> Pair:
        """A positive definite matrix that is written as one: EᵀE + I, or E + I of a semi-definite E."""
        inner = self.pair(scope, joint, depth)
        psd = inner.expr.facts(problem().facts).psd
        return (inner if psd else inner.T @ inner).shifted(1)

    def inverse(self, scope: Names, joint: bool, depth: int) -> Pair:
        if self.draw(st.booleans()):
            inner = self.positive(scope, joint, depth)
        else:
            inner = self.pair(scope, joint, depth)
            inner = inner.shifted(1 + int(torch.linalg.matrix_norm(inner.value, 2)))
        return Pair(inverse(inner.expr), torch.linalg.inv(inner.value))

    def root(self, scope: Names, joint: bool, depth: int) -> Pair:
        inner = self.positive(scope, joint, depth)
        values, vectors = torch.linalg.eigh((inner.value + inner.value.T) / 2)
        if self.draw(st.booleans()):
            return Pair(sqrt(inner.expr), vectors * values.sqrt() @ vectors.T)
        return Pair(inv_sqrt(inner.expr), vectors / values.sqrt() @ vectors.T)

    def diagonal(self, scope: Names, joint: bool, depth: int) -> Pair:
        inner = self.pair(scope, joint, depth)
        return Pair(diagonal_part(inner.expr), inner.value.diagonal().diag())

    def nystrom(self, scope: Names, joint: bool, depth: int) -> Pair:
        """Of full rank, where it is the matrix itself."""
        inner = self.positive(scope, joint, depth)
        return Pair(nystrom(inner.expr, size(scope)), inner.value)

    # -- blocks -------------------------------------------------------------------------------------------------------

    def partition(self, scope: Names) -> list[Names]:
        names = self.draw(st.permutations(scope))
        cuts = [0, *sorted(self.draw(st.sets(st.integers(1, len(names))))), len(names)]
        return [tuple(names[i:j]) for i, j in itertools.pairwise(cuts) if i < j]

    def whole(self, scope: Names, joint: bool, depth: int) -> Pair:
        inner, order = self.pair(scope, joint, depth), list(range(size(scope)))
        order = by_rows(scope) if joint else order
        value = torch.zeros_like(inner.value)
        groups = self.partition(scope)
        by = self.draw(st.sampled_from(["parameter", "module", groups[: self.draw(st.integers(1, len(groups)))]]))
        modules = [list(names) for _, names in itertools.groupby(scope, lambda name: name[0])]
        chosen = {"parameter": [[name] for name in scope], "module": modules}
        for group in chosen[by] if isinstance(by, str) else by:
            inside = set(positions(tuple(group), scope))
            at = [i for i, flat in enumerate(order) if flat in inside]
            value += put(moved(inner.value, at), at, len(value))
        return Pair(block_diagonal(inner.expr, by=by), value)

    def given(self, scope: Names, joint: bool, depth: int) -> Pair:
        groups = self.partition(scope)
        groups = groups[: self.draw(st.integers(1, len(groups)))] if self.draw(st.booleans()) else groups
        value, blocks = torch.zeros(size(scope), size(scope)).double(), []
        for group in groups:
            group = tuple(name for name in ALL if name in group)
            rows = group in (ALL[:2], ALL[2:]) and self.draw(st.booleans())
            if scope == ALL and not rows and self.draw(st.integers(0, 3)) == 0:  # a sub-matrix of something larger
                outer = self.pair(ALL, False, depth)
                block = Pair(restrict(outer.expr, group), moved(outer.value, positions(group)))
            else:
                block = self.pair(group, rows, depth)
            at = positions(group, scope)
            value += put(block.value, [at[i] for i in by_rows(group)] if rows else at, len(value))
            blocks.append(Block(group, block.expr, joint=rows))
        return Pair(block_diagonal(blocks), moved(value, by_rows(scope)) if joint else value)

    def restricted(self, depth: int) -> Pair:
        """Sums and products of sub-matrices over the same parameters."""
        chosen = self.draw(st.sets(st.sampled_from(ALL), min_size=1))
        names = tuple(name for name in ALL if name in chosen)

        def part() -> Pair:
            inner = self.pair(ALL, False, depth)
            return Pair(restrict(inner.expr, names), moved(inner.value, positions(names)))

        first, second = part(), part()
        total = self.draw(scales) * first + second
        damped = (total.T @ total).shifted(1)
        inverted = Pair(inverse(damped.expr), torch.linalg.inv(damped.value))
        return self.draw(st.sampled_from([first, total.shifted(2), first @ second.T, inverted, damped]))


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    grammar = _Grammar(draw)
    return grammar.restricted(2) if draw(st.integers(0, 4)) == 0 else grammar.pair(ALL)


def close(got: Tensor, expected: Tensor, scale: float) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= TOLERANCE * max(1.0, scale)


@settings(
    max_examples=5000 if NIGHTLY else 200,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(pairs())
def test_lowered_expressions_equal_dense_arithmetic(pair: Pair) -> None:
    value = pair.value
    scale = float(value.abs().max())
    assume(scale < 1e4)
    op = pair.expr.lower(problem())
    event(type(pair.expr).__name__)
    close(op.to_dense(), value, scale)
    x = _numbers(len(value), 2)
    close(op @ x, value @ x, scale)
    close(op.T @ x[:, 0], value.T @ x[:, 0], scale)
    check_exact(op, value, scale)


def check_exact(op: object, value: Tensor, scale: float) -> None:
    """Each quantity that the structure is said to give exactly."""
    if (trace := op.exact("trace")) is not None:
        close(torch.tensor(trace, dtype=value.dtype), value.trace(), scale)
    if (diagonal := op.exact("diagonal")) is not None:
        close(diagonal, value.diagonal(), scale)
    singular_values = torch.linalg.svdvals(value)
    if float(singular_values[-1]) > 1e-3 and (logdet := op.exact("logdet")) is not None:
        close(torch.tensor(logdet, dtype=value.dtype), singular_values.log().sum(), scale / float(singular_values[-1]))
    if (pairs := op.exact("eigh")) is not None:
        values = torch.cat([pairs.eigenvalues, torch.full((pairs.multiplicity,), pairs.rest).double()]).sort().values
        close(values, torch.linalg.eigvalsh((value + value.T) / 2), scale)
        vectors = pairs.vectors(slice(None))
        close(value @ vectors, vectors * pairs.eigenvalues, scale)

"""Facts are proven: what is claimed of a random expression must hold for its matrix over random leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from curvalg.expr import (
    Block,
    BlockDiagonal,
    DiagonalPart,
    Expr,
    Facts,
    Identity,
    Inverse,
    LossFacts,
    NamedExpr,
    Nystrom,
    Product,
    Restriction,
    Space,
    SquareRoot,
    Sum,
    Transpose,
    Zero,
    ZeroExpr,
    block_diagonal,
    diagonal_part,
    inv_sqrt,
    inverse,
    nystrom,
    restrict,
    sqrt,
)
from tests.support.strategies import O, P, expressions, moderate

Matrix = np.ndarray
SIZES: dict[Space, int] = {P: 4, O: 3}
PARAMETERS = {"a": [0, 1], "b": [2], "c": [3]}
"""Parameter names -> their entries in the layout."""


# -- leaves whose facts are true by construction ----------------------------------------------------------------------


@dataclass(frozen=True)
class StandIn(NamedExpr):
    """A random matrix that is ``kind``."""

    kind: str
    seed: int

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return {
            "any": Facts(),
            "asymmetric": Facts(symmetric=False),
            "symmetric": Facts(symmetric=True),
            "semidefinite": Facts(psd=True),
            "definite": Facts(positive_definite=True),
            "indefinite": Facts(symmetric=True, psd=False),
        }[self.kind]

    def matrix(self) -> Matrix:
        rows, columns = SIZES[self.codomain], SIZES[self.domain]
        random = np.random.default_rng([self.seed, len(self.kind), rows, columns])
        a = random.standard_normal((rows, columns))
        if self.kind in ("any", "asymmetric"):
            return a
        symmetric = (a + a.T) / 2
        if self.kind == "symmetric":
            return symmetric
        if self.kind == "indefinite":
            return symmetric - (np.linalg.eigvalsh(symmetric)[0] + 0.5) * np.eye(rows)
        low = a[:, : rows - 1] @ a[:, : rows - 1].T
        return low if self.kind == "semidefinite" else low + 0.5 * np.eye(rows)


@dataclass(frozen=True)
class OutputStandIn(StandIn):
    domain: ClassVar[Space] = O
    codomain: ClassVar[Space] = O


@dataclass(frozen=True)
class MapStandIn(StandIn):
    codomain: ClassVar[Space] = O


kinds = st.sampled_from(["any", "asymmetric", "symmetric", "semidefinite", "semidefinite", "definite", "indefinite"])
seeds = st.integers(0, 3)
maps = st.builds(MapStandIn, st.just("asymmetric"), seeds)
LEAVES: dict[tuple[Space, Space], st.SearchStrategy[Expr]] = {
    (P, P): st.one_of(st.builds(StandIn, kinds, seeds), st.sampled_from([Identity, Zero, ZeroExpr(P, P)])),
    (O, O): st.one_of(st.builds(OutputStandIn, kinds, seeds), st.just(Identity)),
    (O, P): maps,
    (P, O): maps.map(lambda m: m.T),
}
names = st.sampled_from([("a",), ("b",), ("c",), ("a", "b"), ("c", "a")])


# -- the matrix of an expression, straight from the definitions -------------------------------------------------------


def entries(params: Sequence[str] | None) -> list[int]:
    return [i for name in (PARAMETERS if params is None else params) for i in PARAMETERS[name]]


def size(space: Space, params: Sequence[str] | None) -> int:
    return len(entries(params)) if space == P else SIZES[space]


def shape(expr: Expr, context: int) -> tuple[int, int]:
    if expr.domain is None:
        return context, context
    return size(expr.codomain, expr.codomain_params), size(expr.domain, expr.domain_params)


def dense(expr: Expr, context: int) -> Matrix:
    """The matrix; ``context`` is the size of what has none of its own."""
    rows, columns = shape(expr, context)
    match expr:
        case StandIn():
            return expr.matrix()
        case ZeroExpr():
            return np.zeros((rows, columns))
        case Sum():
            parts = [float(c) * dense(e, rows) for e, c in expr.coefficients.items()]
            return sum(parts, start=float(expr.shift) * np.eye(rows, columns))
        case Product():
            product = np.eye(rows)
            for factor in expr.factors:
                product = product @ dense(factor, product.shape[1])
            return product
        case Transpose():
            return dense(expr.expr, rows).T
        case Inverse():
            inner = dense(expr.expr, rows)
            assume(np.linalg.cond(inner) < 1e4)
            return np.linalg.inv(inner)
        case SquareRoot():
            values, vectors = np.linalg.eigh(trusted(dense(expr.expr, rows)))
            return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
        case DiagonalPart():
            return np.diag(np.diag(dense(expr.expr, rows)))
        case Nystrom():
            return _nystrom(trusted(dense(expr.expr, rows)), expr)
        case Restriction():
            return _restricted(expr, context)
        case BlockDiagonal():
            return _block_diagonal(expr)
    return np.eye(rows)


def trusted(matrix: Matrix) -> Matrix:
    """What roots and Nyström approximations take on trust where it is not known when written."""
    assume(refuted(Facts(psd=True), matrix) is None)
    return matrix


def _nystrom(inner: Matrix, expr: Nystrom) -> Matrix:
    test = np.random.default_rng(expr.seed).standard_normal((len(inner), min(expr.rank, len(inner))))
    test = np.linalg.qr(test)[0]
    image = inner @ test
    return image @ np.linalg.pinv(test.T @ image, rcond=1e-9, hermitian=True) @ image.T


def _restricted(expr: Restriction, context: int) -> Matrix:
    inner, kept = dense(expr.expr, context), entries(expr.params)
    inner = inner[kept] if expr.codomain == P else inner
    return inner[:, kept] if expr.domain == P else inner


def _block_diagonal(expr: BlockDiagonal) -> Matrix:
    if isinstance(expr.what, Expr):
        layout = entries(expr.what.domain_params)
        inner = dense(expr.what, len(layout))
        groups = list(PARAMETERS) if isinstance(expr.by, str) else [name for group in expr.by or () for name in group]
        blocks = [
            (kept, inner) for name in groups if (kept := [layout.index(i) for i in PARAMETERS[name] if i in layout])
        ]
        result = np.zeros_like(inner)
        for kept, matrix in blocks:
            result[np.ix_(kept, kept)] = matrix[np.ix_(kept, kept)]
        return result
    result = np.zeros((SIZES[P], SIZES[P]))
    for block in expr.what:
        kept = entries(block.params)
        inner = dense(block.expr, len(kept))
        result[np.ix_(kept, kept)] = inner if len(inner) == len(kept) else inner[np.ix_(kept, kept)]
    return result


def refuted(facts: Facts, matrix: Matrix) -> str | None:
    """Which fact the matrix contradicts; None where it contradicts none."""
    scale = 1e-7 * max(1.0, np.abs(matrix).max())
    if matrix.shape[0] != matrix.shape[1]:
        return "a fact of what is not square" if True in vars(facts).values() else None
    asymmetry = np.abs(matrix - matrix.T).max()
    lowest = np.linalg.eigvalsh((matrix + matrix.T) / 2)[0]
    claims = {
        "symmetric": (facts.symmetric, asymmetry <= scale),
        "psd": (facts.psd, asymmetry <= scale and lowest >= -scale),
        "positive_definite": (facts.positive_definite, asymmetry <= scale and lowest > scale * 1e-3),
    }
    return next((name for name, (claim, truth) in claims.items() if claim is not None and claim != truth), None)


filters = [HealthCheck.filter_too_much, HealthCheck.too_slow]


@settings(max_examples=400, deadline=None, suppress_health_check=filters)
@given(expressions((P, P), leaves=LEAVES, scales=moderate, names=names, depth=3))
def test_claims_hold_for_random_expressions(expr: Expr) -> None:
    covering = all(_covers(node) for node in _nodes(expr))
    assume(covering)
    matrix = dense(expr, SIZES[P])
    assume(np.abs(matrix).max() < 1e5)
    assert refuted(expr.facts(), matrix) is None


@settings(max_examples=100, deadline=None, suppress_health_check=filters)
@given(expressions((P, P), params=("a", "c"), leaves=LEAVES, scales=moderate, names=names, depth=3))
def test_claims_hold_for_restricted_expressions(expr: Expr) -> None:
    assume(all(_covers(node) for node in _nodes(expr)))
    matrix = dense(expr, 3)
    assume(np.abs(matrix).max() < 1e5)
    assert refuted(expr.facts(), matrix) is None


def _nodes(expr: Expr) -> list[Expr]:
    return [expr, *(node for child in expr.children for node in _nodes(child))]


def _covers(expr: Expr) -> bool:
    """Blocks are disjoint and within the parameters: others are refused when lowered, not when written."""
    if not isinstance(expr, BlockDiagonal) or isinstance(expr.by, str):
        return True
    groups = [block.params for block in expr.what] if not isinstance(expr.what, Expr) else list(expr.by or ())
    inside = (expr.what.domain_params if isinstance(expr.what, Expr) else None) or tuple(PARAMETERS)
    named = [name for group in groups for name in group]
    return len(set(named)) == len(named) and set(named) <= set(inside)


@pytest.mark.parametrize("kind", ["any", "asymmetric", "symmetric", "semidefinite", "definite", "indefinite"])
def test_the_stand_ins_are_what_they_claim(kind: str) -> None:
    for seed in range(4):
        for make in (StandIn, OutputStandIn):
            leaf = make(kind, seed)
            assert refuted(leaf.facts(), leaf.matrix()) is None


# -- what must not be forgotten: claims that follow and that laws rely on ---------------------------------------------

S, D, N, A = (StandIn(kind, 0) for kind in ("semidefinite", "definite", "any", "asymmetric"))
J, B = MapStandIn("asymmetric", 0), OutputStandIn("semidefinite", 0)
PSD, DEFINITE, SYMMETRIC = Facts(psd=True), Facts(positive_definite=True), Facts(symmetric=True)

CLAIMS: dict[str, tuple[Expr, Facts]] = {
    "identity": (Identity, DEFINITE),
    "shifted": (S + 0.1 * Identity, DEFINITE),
    "negatively shifted": (S - 0.1 * Identity, SYMMETRIC),
    "sum": (S + 2 * D, DEFINITE),
    "difference": (S - D, SYMMETRIC),
    "negative": (-D, Facts(symmetric=True, psd=False)),
    "negative semidefinite": (-S, SYMMETRIC),
    "negative and shifted": (-S - Identity, Facts(symmetric=True, psd=False)),
    "a multiple of the identity": (-2 * Identity, Facts(symmetric=True, psd=False)),
    "one asymmetric part": (StandIn("asymmetric", 0) + S, Facts(symmetric=False)),
    "two asymmetric parts": (StandIn("asymmetric", 0) + StandIn("asymmetric", 1).T, Facts()),
    "asymmetric beside unknown": (StandIn("asymmetric", 0) + N, Facts()),
    "with its transpose": (A + A.T, SYMMETRIC),
    "minus its transpose": (A - A.T, Facts()),
    "unevenly with its transpose": (A + 2 * A.T, Facts()),
    "with its transpose and a third": (A + A.T + StandIn("asymmetric", 1), Facts()),
    "unknown with its transpose": (N + N.T + S, SYMMETRIC),
    "products that mirror each other": (2 * S @ D + 2 * D @ S, SYMMETRIC),
    "products that do not": (2 * S @ D + D @ S, Facts()),
    "transposed products": ((N @ A).T + N @ A, SYMMETRIC),
    "transposed products, written out": (A.T @ N.T - S + N @ A, SYMMETRIC),
    "transposed sums": ((N + A).T + N + A, SYMMETRIC),
    "inverses that mirror each other": (inverse(A + Identity) + inverse(A.T + Identity), SYMMETRIC),
    "restrictions that mirror each other": (restrict(A, "a") + restrict(A.T, "a"), SYMMETRIC),
    "blocks that mirror each other": (block_diagonal(A) + block_diagonal(A.T), SYMMETRIC),
    "inverse of what turns out to be zero": (inverse(D - D.T) @ N, Facts()),
    "sum of maps": (J + MapStandIn("asymmetric", 1), Facts(symmetric=False)),
    "unknown": (N + S, Facts()),
    "gram": (N.T @ N, PSD),
    "sandwich": (J.T @ B @ J, PSD),
    "square": (S @ S, PSD),
    "square of definite": (D @ D, DEFINITE),
    "congruence of definite by definite": (D @ (S + Identity) @ D, DEFINITE),
    "congruence": (N @ StandIn("symmetric", 0) @ N.T, SYMMETRIC),
    "gram of a product": ((N @ A).T @ (N @ A), PSD),
    "gram of a transposed product": ((N @ A) @ (N @ A).T, PSD),
    "gram of a sum": ((N + A).T @ (N.T + A.T).T, PSD),
    "sandwich by a product": ((A @ N).T @ S @ (A @ N), PSD),
    "sandwich of maps and products": ((J @ A).T @ B @ J @ A, PSD),
    "congruence by a product": ((A @ N).T @ StandIn("symmetric", 0) @ A @ N, SYMMETRIC),
    "gram of a negative": ((-N).T @ N, SYMMETRIC),
    "no gram of a product": ((N @ A).T @ (A @ N), Facts()),
    "symmetric sum in the middle": (N.T @ (A + A.T) @ N, SYMMETRIC),
    "product of two": (S @ D, Facts()),
    "map": (J, Facts(symmetric=False)),
    "product of maps": (J @ S, Facts(symmetric=False)),
    "inverse of semidefinite": (inverse(S + 0 * D), DEFINITE),
    "inverse of symmetric": (inverse(StandIn("symmetric", 0)), SYMMETRIC),
    "transpose": (D.T, DEFINITE),
    "restriction": (restrict(D, "a"), DEFINITE),
    "restriction of asymmetric": (restrict(StandIn("asymmetric", 0), "a"), Facts()),
    "blocks": (block_diagonal(D), DEFINITE),
    "blocks by module": (block_diagonal(D, by="module"), DEFINITE),
    "blocks of groups": (block_diagonal(D, by=[["a"], ["b", "c"]]), PSD),
    "complete blocks": (BlockDiagonal((Block(("a", "c"), D), Block(("b",), D)), None, complete=True), DEFINITE),
    "complete groups": (BlockDiagonal(D, (("a",), ("b", "c")), complete=True), DEFINITE),
    "root": (sqrt(StandIn("definite", 0)), DEFINITE),
    "root of semidefinite": (sqrt(S), PSD),
    "inverse root": (inv_sqrt(D), DEFINITE),
    "congruence by a root": (sqrt(D) @ S @ sqrt(D), PSD),
    "congruence by a diagonal": (diagonal_part(N) @ S @ diagonal_part(N), PSD),
    "diagonal": (diagonal_part(D), DEFINITE),
    "diagonal of semidefinite": (diagonal_part(S), PSD),
    "diagonal of indefinite": (diagonal_part(StandIn("indefinite", 0)), SYMMETRIC),
    "diagonal of unsymmetric": (diagonal_part(A), SYMMETRIC),
    "nystrom": (nystrom(D, 2), PSD),
    "nystrom with a shift": (nystrom(S + Identity, 2), DEFINITE),
    "blocks that leave parameters out": (block_diagonal({"a": D, "b": D}), PSD),
    "block of a symmetric": (block_diagonal({"a": StandIn("symmetric", 0)}), SYMMETRIC),
    "blocks of unsymmetric": (block_diagonal(StandIn("asymmetric", 0)), Facts()),
    "given blocks": (block_diagonal({"a": D, "b": S}), PSD),
    "zero": (S - S, Facts(psd=True, positive_definite=False)),
    "zero of a map": (J - J, Facts(symmetric=False)),
    "zero of a restriction": (restrict(N, "a") - restrict(N, "a"), Facts(psd=True, positive_definite=False)),
    "zero between restrictions": (restrict(J, "a").T @ (B - B) @ J, Facts(positive_definite=False)),
    # Two patterns may choose the same parameters.
    "different restrictions": (restrict(J, "head.*").T @ restrict(J, "head.w*"), Facts()),
}


@pytest.mark.parametrize("what", CLAIMS)
def test_claims(what: str) -> None:
    expr, expected = CLAIMS[what]
    assert expr.facts() == expected


# Without a value in this world: inverses of what is singular, and names of other parameters.
WORDS_ALONE = ("inverse of what turns out to be zero", "inverse of semidefinite", "different restrictions")


@pytest.mark.parametrize("what", [what for what in CLAIMS if what not in WORDS_ALONE])
@settings(max_examples=5, deadline=None, suppress_health_check=filters)
@given(seed=st.integers(0, 99))
def test_these_claims_hold(what: str, seed: int) -> None:
    expr = _reseeded(CLAIMS[what][0], seed)
    matrix = dense(expr, SIZES[P])
    assert matrix.shape == shape(expr, SIZES[P])
    assert refuted(expr.facts(), matrix) is None


def _reseeded(expr: Expr, seed: int) -> Expr:
    """The expression over other stand-ins."""
    if isinstance(expr, StandIn):
        return dataclasses.replace(expr, seed=expr.seed + 10 * seed)
    return expr.rebuild(tuple(_reseeded(child, seed) for child in expr.children))


@settings(max_examples=150, deadline=None, suppress_health_check=filters)
@given(expressions((P, P), leaves=LEAVES, scales=moderate, names=names, depth=2))
def test_what_is_added_to_or_multiplied_by_its_transpose_is_symmetric(expr: Expr) -> None:
    assume(all(_covers(node) for node in _nodes(expr)))
    assume(not any(isinstance(node, Inverse) for node in _nodes(expr)))  # a preconditioner is no part of the value
    matrix = dense(expr, SIZES[P])
    assume(np.abs(matrix).max() < 1e3)
    for symmetric in (expr + expr.T, expr.T @ expr, expr @ expr.T):
        facts = symmetric.facts()
        assert facts.symmetric
        assert refuted(facts, dense(symmetric, SIZES[P])) is None


def test_facts_of_deep_nesting_take_no_exponential_time() -> None:
    unknown: Expr = N
    definite: Expr = S
    for _ in range(40):
        unknown = inverse(A.T @ unknown @ A + N + Identity)
        definite = inverse(A.T @ definite @ A + Identity)
    assert unknown.facts() == Facts()
    assert definite.facts() == DEFINITE

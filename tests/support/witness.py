"""Stand-in matrices and a dense evaluator: the numbers that laws are checked with. NumPy only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce, singledispatchmethod
from typing import Any

import numpy as np

import curvalg.expr as alg
from curvalg.expr import Expr, Facts, LossFacts, NamedExpr

Array = Any


@dataclass(frozen=True)
class Matrix(NamedExpr):
    """A stand-in for an arbitrary square matrix on parameters, with a letter for a name."""

    letter: str
    symmetric: bool = False
    definite: bool = False

    @property
    def label(self) -> str:
        return self.letter

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return Facts(True if self.symmetric else None, positive_definite=True if self.definite else None)


class DenseWorld:
    """Random matrices for every leaf, consistent with each other, and the dense value of any expression over them.

    In this world ``ggn = jacobian.T @ loss_hessian @ jacobian``, ``hessian = ggn + residual``, and the Fisher is the GGN.

    Args:
        groups: parameter names by pattern, as flat positions.
        outputs: number of outputs.
        seed: of the random matrices.
    """

    def __init__(self, groups: Mapping[str, Sequence[int]], outputs: int, seed: int = 0) -> None:
        self.groups = groups
        self.size = sum(len(g) for g in groups.values())
        self.outputs = outputs
        self.seed = seed
        self.outer: tuple[DenseWorld, list[int]] | None = None

    def _random(self, key: str, rows: int, columns: int, symmetric: bool = False) -> Array:
        generator = np.random.default_rng([self.seed, *key.encode()])
        matrix = generator.standard_normal((rows, columns))
        return matrix + matrix.T if symmetric else matrix

    def positions(self, patterns: Iterable[str], joint: bool = False) -> list[int]:
        """Flat positions of the named groups; a joint layout mixes them."""
        flat = [i for p in patterns for i in self.groups[p]]
        return flat[::2] + flat[1::2] if joint else flat

    def inside(self, names: Sequence[str], joint: bool = False) -> DenseWorld:
        """The world of a block: the same matrices over some of the parameters, in the block's layout."""
        positions = self.positions(names, joint)
        groups = {name: [positions.index(i) for i in self.groups[name]] for name in names}
        world = DenseWorld(groups, self.outputs, self.seed)
        world.outer = self, positions
        return world

    def length(self, space: str | None, params: Sequence[str] | None = None) -> int:
        """Dimension of a space."""
        if params and isinstance(params[0], alg.Entries):
            return len(self.among(params[0]))
        if params:
            return len(self.positions(params))
        return self.outputs if space == "outputs" else self.size

    def value(self, expr: Expr) -> Array:
        """The dense matrix of an expression; what has no size of its own is as large as all parameters."""
        return self.dense(expr, self.length(expr.codomain, expr.codomain_params))

    def dense(self, expr: Expr, size: int) -> Array:
        """The dense matrix; ``size`` is the number of rows of what has no size of its own."""
        if self.outer is None or not isinstance(expr, NamedExpr):
            return self._dense(expr, size)
        world, positions = self.outer
        whole = world.value(expr)
        whole = whole[positions] if expr.codomain == "parameters" else whole
        return whole[:, positions] if expr.domain == "parameters" else whole

    @singledispatchmethod
    def _dense(self, expr: Expr, size: int) -> Array:
        raise TypeError(f"no stand-in for {expr}")

    @_dense.register
    def _(self, expr: Matrix, size: int) -> Array:
        matrix = self._random(expr.letter, self.size, self.size, expr.symmetric)
        return matrix @ matrix.T + np.eye(self.size) if expr.definite else matrix

    @_dense.register
    def _(self, expr: alg.Jacobian, size: int) -> Array:
        return self._random("jacobian", self.outputs, self.size)

    @_dense.register
    def _(self, expr: alg.LossHessian, size: int) -> Array:
        return self._random("loss_hessian", self.outputs, self.outputs, True)

    @_dense.register(alg.GGN)
    @_dense.register(alg.Fisher)
    def _(self, expr: Expr, size: int) -> Array:
        jacobian = self.value(alg.Jacobian())
        return jacobian.T @ self.value(alg.LossHessian()) @ jacobian

    @_dense.register(alg.MonteCarloGGN)
    @_dense.register(alg.MonteCarloFisher)
    def _(self, expr: Any, size: int) -> Array:
        return self._random(f"mc {expr.samples} {expr.seed}", self.size, self.size, True)

    @_dense.register(alg.Residual)
    @_dense.register(alg.Covariance)
    @_dense.register(alg.CenteredCovariance)
    def _(self, expr: NamedExpr, size: int) -> Array:
        return self._random(expr.name, self.size, self.size, True)

    @_dense.register
    def _(self, expr: alg.Hessian, size: int) -> Array:
        return self.value(alg.GGN()) + self.value(alg.Residual())

    @_dense.register
    def _(self, expr: alg.IdentityExpr, size: int) -> Array:
        return np.eye(size)

    @_dense.register
    def _(self, expr: alg.ZeroExpr, size: int) -> Array:
        if expr.domain is None:
            return np.zeros((size, size))
        rows, columns = (expr.codomain, expr.codomain_params), (expr.domain, expr.domain_params)
        return np.zeros((self.length(*rows), self.length(*columns)))

    @_dense.register
    def _(self, expr: alg.Diagonal, size: int) -> Array:
        return np.diag(np.asarray(expr.values))

    @_dense.register
    def _(self, expr: alg.Kronecker, size: int) -> Array:
        return reduce(np.kron, [np.asarray(factor) for factor in expr.factors])

    @_dense.register
    def _(self, expr: alg.LowRank, size: int) -> Array:
        left = np.asarray(expr.left)
        right = left if expr.right is None else np.asarray(expr.right)
        core = np.eye(left.shape[1]) if expr.core is None else np.asarray(expr.core)
        return left @ (np.diag(core) if core.ndim == 1 else core) @ right.T

    @_dense.register
    def _(self, expr: alg.Eigenbasis, size: int) -> Array:
        basis = self.dense(expr.basis, size) if isinstance(expr.basis, alg.Kronecker) else np.asarray(expr.basis)
        return basis * np.asarray(expr.values) @ basis.T

    @_dense.register
    def _(self, expr: alg.Sum, size: int) -> Array:
        rows = self.length(expr.codomain, expr.codomain_params) if expr.codomain else size
        parts = [float(c) * self.dense(part, rows) for part, c in expr.coefficients.items()]
        return sum(parts, float(expr.shift) * np.eye(rows) if expr.shift else 0 * (parts[0] if parts else 0))

    @_dense.register
    def _(self, expr: alg.Product, size: int) -> Array:
        return np.linalg.multi_dot([self.dense(f, size) for f in expr.factors])

    @_dense.register
    def _(self, expr: alg.Transpose, size: int) -> Array:
        return self.dense(expr.expr, size).T

    @_dense.register
    def _(self, expr: alg.Inverse, size: int) -> Array:
        return np.linalg.inv(self.dense(expr.expr, size))

    @_dense.register
    def _(self, expr: alg.SquareRoot, size: int) -> Array:
        values, vectors = np.linalg.eigh(self.dense(expr.expr, size))
        return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T

    @_dense.register
    def _(self, expr: alg.DiagonalPart, size: int) -> Array:
        return np.diag(np.diag(self.dense(expr.expr, size)))

    @_dense.register
    def _(self, expr: alg.Nystrom, size: int) -> Array:
        whole = self.dense(expr.expr, size)
        random = self._random(f"test matrix {expr.seed}", len(whole), min(expr.rank, len(whole)))
        image = whole @ (test := np.linalg.qr(random)[0])
        return image @ np.linalg.pinv(test.T @ image, rcond=1e-9, hermitian=True) @ image.T

    @_dense.register
    def _(self, expr: alg.Restriction, size: int) -> Array:
        keep, inner = self.positions(expr.params), self.dense(expr.expr, self.size)
        inner = inner[keep] if expr.expr.codomain == "parameters" else inner
        return inner[:, keep] if expr.expr.domain == "parameters" else inner

    @_dense.register
    def _(self, expr: alg.EntryRestriction, size: int) -> Array:
        keep, inner = self.among(expr.entries), self.value(expr.expr)
        inner = inner[keep] if expr.expr.codomain == "parameters" else inner
        return inner[:, keep] if expr.expr.domain == "parameters" else inner

    def among(self, entries: alg.Entries) -> list[int]:
        """Rows of entries, which are given by slices and ..., among those of their parameters."""
        rows: list[int] = []
        start = 0
        for name in self.groups:
            if name in entries.choices:
                every = range(start, start := start + len(self.groups[name]))
                choice = entries.choices[name]
                rows += every[choice] if isinstance(choice, slice) else every
        return rows

    @_dense.register
    def _(self, expr: alg.BlockDiagonal, size: int) -> Array:
        if isinstance(expr.what, Expr):
            return self._diagonal_blocks(expr.what, expr.by)
        result = np.zeros((self.size, self.size))
        for block in expr.what:
            keep = self.positions(block.params, block.joint)
            result[np.ix_(keep, keep)] = self.inside(block.params, block.joint).dense(block.expr, len(keep))
        return result

    def _diagonal_blocks(self, what: Expr, by: alg.Partition | None) -> Array:
        whole = self.dense(what, self.length("parameters", what.domain_params))
        layout = self.groups if what.domain_params is None else self.inside(what.domain_params).groups
        modules: dict[str, list[str]] = {}
        for name in layout:
            modules.setdefault(name.rpartition(".")[0] if by == "module" else name, []).append(name)
        result = np.zeros_like(whole)
        for names in modules.values() if isinstance(by, str) or by is None else by:
            keep = [i for name in names if name in layout for i in layout[name]]
            result[np.ix_(keep, keep)] = whole[np.ix_(keep, keep)]
        return result


# -- what the laws are tried on -----------------------------------------------------------------------------------------

GROUPS = {"a": (0, 1), "b": (2,), "m.w": (3, 4), "m.b": (5,)}
"""Parameters of the witnesses' world, six numbers in all."""
A, B, S, P, Q = (
    Matrix("A"),
    Matrix("B"),
    Matrix("S", symmetric=True),
    Matrix("P", definite=True),
    Matrix("Q", definite=True),
)
_random = np.random.default_rng(0)
D, E = alg.Diagonal(_random.standard_normal(6)), alg.Diagonal(_random.standard_normal(6))
K, L = (alg.Kronecker(_random.standard_normal((2, 2)), _random.standard_normal((3, 3))) for _ in range(2))
R = alg.LowRank(_random.standard_normal((6, 2)), _random.standard_normal((2, 2)), _random.standard_normal((6, 2)))
_basis = np.linalg.qr(_random.standard_normal((6, 6)))[0]
U, V = (alg.Eigenbasis(_basis, _random.standard_normal(6)) for _ in range(2))
_factors = alg.Kronecker(*(np.linalg.qr(_random.standard_normal((n, n)))[0] for n in (2, 3)))
X, Y = (alg.Eigenbasis(_factors, _random.standard_normal(6)) for _ in range(2))


def blocks(*parts: tuple[Sequence[str], Expr], joint: bool = False) -> alg.BlockDiagonal:
    """A complete block-diagonal of (names, expression); with ``joint``, blocks of several names are in joint layout."""
    made = tuple(alg.Block(tuple(names), expr, joint=joint and len(names) > 1) for names, expr in parts)
    return alg.BlockDiagonal(made, None, complete=True)


FINE = blocks((["a"], A), (["b"], S), (["m.w"], 3 * alg.Identity), (["m.b"], P))
COARSE = blocks((["a"], B), (["b"], P), (["m.w", "m.b"], A), joint=True)
CROSSED = blocks((["a", "b"], 2 * alg.Identity - alg.Identity / 2), (["m.b", "m.w"], S))

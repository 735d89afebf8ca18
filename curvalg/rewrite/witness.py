"""Stand-in matrices and a dense evaluator: the numbers that laws are checked with. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatchmethod
from typing import Any

import numpy as np

import curvalg.expr as alg
from curvalg.expr import terms
from curvalg.expr.facts import Facts, LossFacts
from curvalg.expr.node import Expr
from curvalg.expr.term import NamedExpr

Array = Any


@dataclass(frozen=True)
class Matrix(NamedExpr):
    """A stand-in for an arbitrary square matrix on parameters, with a letter for a name."""

    letter: str
    symmetric: bool = False

    @property
    def label(self) -> str:
        return self.letter

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return Facts(symmetric=True if self.symmetric else None)


class DenseWorld:
    """Random matrices for every leaf, consistent with each other, and the dense value of any expression over them.

    In this world ``ggn = jacobian.T @ loss_hessian @ jacobian``, ``hessian = ggn + residual``, and the Fisher is the GGN.

    Args:
        groups: parameter names by pattern, as flat positions.
        outputs: number of outputs.
        seed: of the random matrices.
    """

    def __init__(self, groups: dict[str, Sequence[int]], outputs: int, seed: int = 0) -> None:
        self.groups = groups
        self.size = sum(len(g) for g in groups.values())
        self.outputs = outputs
        self.seed = seed

    def _random(self, key: str, rows: int, columns: int, symmetric: bool = False) -> Array:
        generator = np.random.default_rng([self.seed, *key.encode()])
        matrix = generator.standard_normal((rows, columns))
        return matrix + matrix.T if symmetric else matrix

    def positions(self, patterns: Sequence[str]) -> list[int]:
        """Flat positions of the named groups."""
        return sorted(i for p in patterns for i in self.groups[p])

    def length(self, space: str | None, params: Sequence[str] | None = None) -> int:
        """Dimension of a space."""
        if params:
            return len(self.positions(params))
        return self.outputs if space == "outputs" else self.size

    def value(self, expr: Expr) -> Array:
        """The dense matrix of an expression that has a size."""
        return self.dense(expr, self.length(expr.codomain, expr.codomain_params))

    @singledispatchmethod
    def dense(self, expr: Expr, size: int) -> Array:
        """The dense matrix; ``size`` is the number of rows of what has no size of its own."""
        raise TypeError(f"no stand-in for {expr}")

    @dense.register
    def _(self, expr: Matrix, size: int) -> Array:
        return self._random(expr.letter, self.size, self.size, expr.symmetric)

    @dense.register
    def _(self, expr: terms.Jacobian, size: int) -> Array:
        return self._random("jacobian", self.outputs, self.size)

    @dense.register
    def _(self, expr: terms.LossHessian, size: int) -> Array:
        return self._random("loss_hessian", self.outputs, self.outputs, True)

    @dense.register(terms.GGN)
    @dense.register(terms.Fisher)
    def _(self, expr: Expr, size: int) -> Array:
        jacobian = self.value(terms.Jacobian())
        return jacobian.T @ self.value(terms.LossHessian()) @ jacobian

    @dense.register(terms.MonteCarloGGN)
    @dense.register(terms.MonteCarloFisher)
    def _(self, expr: Any, size: int) -> Array:
        return self._random(f"mc {expr.samples} {expr.seed}", self.size, self.size, True)

    @dense.register(terms.Residual)
    @dense.register(terms.Covariance)
    @dense.register(terms.CenteredCovariance)
    def _(self, expr: NamedExpr, size: int) -> Array:
        return self._random(expr.name, self.size, self.size, True)

    @dense.register
    def _(self, expr: terms.Hessian, size: int) -> Array:
        return self.value(terms.GGN()) + self.value(terms.Residual())

    @dense.register
    def _(self, expr: alg.IdentityExpr, size: int) -> Array:
        return np.eye(size)

    @dense.register
    def _(self, expr: alg.ZeroExpr, size: int) -> Array:
        if expr.domain is None:
            return np.zeros((size, size))
        rows, columns = (expr.codomain, expr.codomain_params), (expr.domain, expr.domain_params)
        return np.zeros((self.length(*rows), self.length(*columns)))

    @dense.register
    def _(self, expr: alg.Sum, size: int) -> Array:
        rows = self.length(expr.codomain, expr.codomain_params) if expr.codomain else size
        parts = [float(c) * self.dense(part, rows) for part, c in expr.coefficients.items()]
        return sum(parts, float(expr.shift) * np.eye(rows) if expr.shift else 0 * (parts[0] if parts else 0))

    @dense.register
    def _(self, expr: alg.Product, size: int) -> Array:
        return np.linalg.multi_dot([self.dense(f, size) for f in expr.factors])

    @dense.register
    def _(self, expr: alg.Transpose, size: int) -> Array:
        return self.dense(expr.expr, size).T

    @dense.register
    def _(self, expr: alg.Inverse, size: int) -> Array:
        return np.linalg.inv(self.dense(expr.expr, size))

    @dense.register
    def _(self, expr: alg.Restriction, size: int) -> Array:
        keep, inner = self.positions(expr.params), self.dense(expr.expr, self.size)
        inner = inner[keep] if expr.expr.codomain == "parameters" else inner
        return inner[:, keep] if expr.expr.domain == "parameters" else inner

    @dense.register
    def _(self, expr: alg.BlockDiagonal, size: int) -> Array:
        result = np.zeros((self.size, self.size))
        if isinstance(expr.what, Expr):
            whole = self.dense(expr.what, self.size)
            by = [(g,) for g in self.groups] if isinstance(expr.by, str) or expr.by is None else expr.by
            for group in by:
                at = np.ix_(self.positions(group), self.positions(group))
                result[at] = whole[at]
            return result
        for block in expr.what:
            keep = self.positions(block.params)
            result[np.ix_(keep, keep)] = self.dense(block.expr, len(keep))
        return result

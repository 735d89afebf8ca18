"""Lanczos approximations of f(A) V, a resumable algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvalg.estimate.functions.scalar_functions import Scalar
from curvalg.estimate.target import Target
from curvalg.runs.run_state import Form, Options, State, is_count, sizes
from curvalg.runs.vector_digest import vectors_digest
from curvalg.solve import quadrature
from curvalg.solve.powers import exponents, scaled
from curvalg.solve.quadrature import Recurrences
from curvalg.tensors.memory import small

LAG = 0.8
"""Share of the steps whose approximation the last one is compared with."""
RARE = 10
"""The approximation is looked at whenever the steps have grown by a tenth, since each look is an eigendecomposition."""


@dataclass(frozen=True)
class KrylovFunction:
    """Approximations f(A) v ≈ ‖v‖ V f(T) e₁ for several columns, V and T from Lanczos with full re-orthogonalisation.

    Args:
        target: a symmetric operator.
        function: f.
        rows: the columns as rows (p, n), none of them zero.
        most: steps after which it stops.
        tol: change relative to ‖f(A) v‖ below which it stops before; None for all the steps.
        before: products that were spent before.
    """

    target: Target
    function: Scalar
    rows: Tensor = field(repr=False)
    most: int
    tol: float | None
    before: int = 0
    name: str = "matrix_function"

    @property
    def options(self) -> Options:
        """All but steps and tolerance, so that a run that stopped can be resumed with more of them."""
        return {"function": self.function.name, "vector": vectors_digest(self.rows, self.target.vectors)}

    def axes(self, state: State) -> Mapping[str, int]:
        """The axis of the tensors that are vectors."""
        return {"basis": 1}

    def start(self) -> State:
        """The state with the columns, normalised."""
        rows, norms, _ = self._sized()
        unit = rows / norms.to(rows)[:, None]
        return self._pack(
            quadrature.begin(unit, whole=True, capacity=self._capacity, space=self.target.vectors), self.before
        )

    def fits(self, state: State) -> bool:
        """Whether basis and tridiagonal matrices belong together, and to these columns."""
        p, n = self.rows.shape
        tridiagonal = torch.float64, ("j", p)
        tensors: Form = {"basis": (self.rows.dtype, ("b", n)), "alphas": tridiagonal, "betas": tridiagonal}
        found = sizes(state, {"products": is_count}, tensors)
        return found is not None and found["b"] == (found["j"] + 1) * p

    def step(self, state: State) -> State:
        """Make one product with all columns that have not converged to rounding."""
        given = self._unpack(state)
        products = state.products + int(given.going.sum())
        return self._pack(quadrature.advance(given, self.target.multiply), products)

    def done(self, state: State) -> bool:
        """Whether the approximations no longer change, or are exact, or steps ran out."""
        given = self._unpack(state)
        steps = given.steps
        if steps >= self.most or not bool(given.going.any()):
            return True
        if self.tol is None or steps < 4 or steps % max(1, steps // RARE):
            return False
        return bool((self.changes(state) <= self.tol).all())

    def expected(self, state: State) -> int:
        """The largest number of products."""
        return self.before + self.most * len(self.rows)

    def changes(self, state: State) -> Tensor:
        """Difference to an approximation of fewer steps, relative to ‖f(A) v‖, (p,); zero where it is exact."""
        given = self._unpack(state)
        now, fewer = self._coefficients(given, given.steps), max(1, int(LAG * given.steps))
        then = torch.zeros_like(now)
        then[:, :fewer] = self._coefficients(given, fewer)
        size = exponents(now.T)[:, None]  # f may be of any scale
        now, then = scaled(now, -size), scaled(then, -size)
        change = (now - then).norm(dim=1) / now.norm(dim=1).clamp_min(torch.finfo(now.dtype).tiny)
        # A single step has nothing to be compared with.
        change = torch.where(torch.tensor(given.steps == fewer, device="cpu"), torch.inf, change)
        return torch.where(given.going, change, 0.0)

    def columns(self, state: State) -> Tensor:
        """The approximations of f(A) V, (n, p)."""
        given = self._unpack(state)
        _, norms, exponent = self._sized()
        weights = self._coefficients(given, given.steps) * small(norms)[:, None]
        size = exponents(weights.T)
        near = scaled(weights, -size[:, None]).to(self.rows)
        values = torch.bmm(near[:, None, :], given.vectors())[:, 0].T.contiguous()
        return scaled(values, size.to(exponent) + exponent)

    def _sized(self) -> tuple[Tensor, Tensor, Tensor]:
        """The columns as rows near one, their norms, and the exponents that were taken away."""
        exponent = exponents(self.rows.T, self.target.vectors)
        rows = scaled(self.rows, -exponent[:, None])
        return rows, self.target.vectors.wide_norms(rows), exponent

    @property
    def _capacity(self) -> int:
        return min(self.most, 64) + 1

    def _coefficients(self, given: Recurrences, steps: int) -> Tensor:
        """The coefficients f(T) e₁ of the first steps, (p, steps)."""
        eps = torch.finfo(self.rows.dtype).eps
        return quadrature.first_column(
            given.alphas[:steps],
            given.betas[:steps],
            lambda x: self.function.at(self.target.back(x), self.target.name, eps),
        )

    def _pack(self, given: Recurrences, products: int) -> State:
        tensors = {"basis": given.basis, "alphas": given.alphas, "betas": given.betas}
        return State(tensors, {"products": products})

    def _unpack(self, state: State) -> Recurrences:
        tensors, device = state.tensors, self.target.space.device
        capacity = self._capacity
        while capacity < len(tensors["alphas"]) + 2:
            capacity *= 2
        return Recurrences(
            tensors["basis"].to(device), tensors["alphas"], tensors["betas"], True, capacity, self.target.vectors
        )

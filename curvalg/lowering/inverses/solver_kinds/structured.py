"""Exact solves by a structured form, verified once at each state."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from curvalg.errors import CurvalgWarning
from curvalg.lowering.inverses.offer import Form
from curvalg.lowering.inverses.rounding import epsilon
from curvalg.lowering.inverses.solver import InverseRequest, Solver
from curvalg.lowering.inverses.verified import Oath, swear, trusted
from curvalg.lowering.matrices import Structure
from curvalg.problem import Problem, Snapshot
from curvalg.problem.kept.reads import Reads
from curvalg.solve import SolveResult
from curvalg.solve.open_columns import OVERFLOW
from curvalg.solve.powers import exponents, scaled
from curvalg.solve.solve_result import CONVERGED, LARGE, ROUNDING
from curvalg.solve.trail import Trail
from curvalg.tensors.bits import finite_columns

REFINEMENTS = 3
"""The most steps of iterative refinement."""


class Prepared:
    """A structure at one state, and what it has proved there.

    Args:
        structure: S.
        multiply: X -> A X, by products of the matrix that it stands for.
        problem: gives dtype, device and rounding.
        unchecked: the option by which the structure is believed without a proof, or empty.
    """

    def __init__(
        self, structure: Structure, multiply: Callable[[Tensor], Tensor], problem: Problem, unchecked: str
    ) -> None:
        self.structure, self.multiply = structure, multiply
        self._problem, self._unchecked = problem, unchecked
        self._oath: Oath | None = None

    @property
    def sworn(self) -> bool:
        """Whether a solve has asked for a proof."""
        return self._oath is not None

    @property
    def oath(self) -> Oath:
        """The proof of the structure, made at the first use."""
        if self._oath is None:
            problem = self._problem
            like = torch.empty(0, dtype=problem.dtype, device=problem.device)
            if self._unchecked:
                self._oath = trusted(self.structure, like, epsilon(problem), self._unchecked)
            else:
                self._oath = swear(self.structure, self.multiply, like, epsilon(problem), REFINEMENTS)
        return self._oath


class Structured(Solver[Prepared]):
    """A structured form, made at the first solve and kept.

    At each snapshot it proves itself once, on random vectors (:mod:`curvalg.lowering.inverses.verified`), and is believed
    then, or at once with ``inverse(check=False)`` or ``Problem(verify=False)``: products cost no look at residuals, unless a
    tolerance was asked for by name. Solves that report refine x against the true residual and are right where that meets the
    tolerance, or is rounding alone. A form that fails has to meet the tolerance each time.

    Args:
        request: the inverse.
        form: of the matrix.
    """

    _warned = False

    def __init__(self, request: InverseRequest, form: Form) -> None:
        self.request, self.form, self.name, self.cost = request, form, form.name, form.cost
        if request.preconditioner is not None:
            self.cost += "; the preconditioner is not needed"

    def prepare(self, snapshot: Snapshot) -> Prepared:
        plan = self.request.matrix.plan
        request, form = self.request, self.form.at(snapshot)
        return Prepared(form, lambda x: plan.apply(snapshot, x), request.problem, request.unchecked)

    def solve(
        self, state: Prepared, b: Tensor, x0: Tensor | None, trail: Trail | None = None, report: bool = True
    ) -> SolveResult:
        """Solve A X = B; a starting point changes nothing."""
        unit = exponents(b)
        b = scaled(b, -unit)
        x, iterations = state.structure.solve(b), torch.zeros_like(unit, dtype=torch.int64)
        if not report and self.trusts(state):
            converged = finite_columns(x)
            residual, reason = torch.full_like(b[0], torch.nan), OVERFLOW
        else:
            x, residual, converged = self._refined(state, b, x, unit)
            reason = f"refinement stalled in {b.dtype}"
        x = scaled(x, unit)
        converged &= finite_columns(x)
        above = residual > self._tolerance(b, unit)  # nowhere where no residual was looked at
        self._warn(converged & above, residual, b)
        reasons = tuple(
            (ROUNDING if high else CONVERGED) if ok else reason
            for ok, high in zip(converged.tolist(), above.tolist(), strict=True)
        )
        return SolveResult(x, converged, iterations, scaled(residual, unit), reasons)

    def trusts(self, state: Prepared) -> bool:
        return state.oath.solves and not self.request.demanding

    def apply(self, state: Prepared, b: Tensor) -> Tensor:
        unit = exponents(b)
        return scaled(state.structure.solve(scaled(b, -unit)), unit)

    def reads(self, state: Prepared) -> Reads | str:
        return state.structure.reads()

    def _refined(self, state: Prepared, b: Tensor, x: Tensor, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The x with the smallest residual that refinement reaches; the norms; which of them are small enough."""
        tolerance = self._tolerance(b, unit)
        r = b - state.multiply(x)
        best = r.norm(dim=0)
        for _ in range(REFINEMENTS):
            if bool((best <= tolerance).all()):
                break
            new = x + state.structure.solve(r)
            residual = b - state.multiply(new)
            norms = residual.norm(dim=0)
            better = (norms < best) | ~torch.isfinite(best)
            x, r, best = torch.where(better, new, x), torch.where(better, residual, r), torch.where(better, norms, best)
            if not bool(better.any()):
                break
        return x, best, torch.isfinite(best) & ((best <= tolerance) | state.oath.accepts(x, b, r))

    def _tolerance(self, b: Tensor, unit: Tensor) -> Tensor:
        """The bound on residuals of B, scaled by powers of two."""
        atol = scaled(torch.full_like(b[:1], float(self.request.node.atol)), -unit)[0]
        tolerance: Tensor = atol + self.request.rtol * b.norm(dim=0)
        return tolerance

    def _warn(self, accepted: Tensor, residual: Tensor, b: Tensor) -> None:
        """Warn once where solves that rounding excuses have left much of b, and the matrix was built by products.

        Its entries are rounded then, and with them x along the smallest eigenvalues. Of arrays that were given x is right, and
        the residual is rounding of the products alone.
        """
        if not self.form.rows:
            return
        relative = torch.where(accepted, residual / b.norm(dim=0), 0.0)
        if self._warned or not bool((relative > max(LARGE, self.request.noise)).any()):
            return
        self._warned = True
        warnings.warn(
            f"{self.name} solved {self.request.matrix.expr} as exactly as products in {b.dtype} allow, but the residual is "
            f"{float(relative.max()):.1e} ‖b‖: the matrix is singular to working precision; increase the damping",
            CurvalgWarning,
            stacklevel=2,
        )

    def oaths(self, state: Prepared) -> list[Oath]:
        return [state.oath] if state.sworn else []

    def approximate(self, state: Prepared, b: Tensor) -> Tensor:
        """Apply A⁻¹ without refinement."""
        return state.structure.solve(b)

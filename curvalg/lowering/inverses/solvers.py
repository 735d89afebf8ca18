"""Strategies for an inverse, tried in order; each gives a solver with its cost, or the reason why it declines.

Laws change an expression without a thought; strategies are numerical choices: the structured forms first, then products
alone. A newcomer is one function and one row of ``STRATEGIES`` (or of :data:`curvalg.lowering.inverses.forms.FORMS`).
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from curvalg.errors import CurvalgWarning, FactsError
from curvalg.expr import Facts, Inverse, ZeroExpr
from curvalg.lowering.blocks.rows import RowRanges
from curvalg.lowering.inverses.forms import FORMS, matrix_blocks
from curvalg.lowering.inverses.offer import BoundMatrix, Form
from curvalg.lowering.inverses.rounding import default_rtol, epsilon, noise
from curvalg.lowering.inverses.verified import Oath, swear, trusted
from curvalg.lowering.lines import alike, indent
from curvalg.problem import Problem, Snapshot
from curvalg.solve import SolveResult, cg, minres
from curvalg.solve.open_columns import OVERFLOW
from curvalg.solve.powers import exponents, scaled
from curvalg.solve.solve_result import CONVERGED, ROUNDING
from curvalg.solve.trail import INTERRUPTED, Trail

LARGE = 1e-2
"""Residuals relative to ‖b‖ above which a solve that rounding excuses is worth a warning."""

Preconditioning = Callable[[Snapshot, Tensor], Tensor]
"""R (n, K) -> P⁻¹ R."""


@dataclass(frozen=True)
class InverseRequest:
    """An inverse to be planned.

    Args:
        node: the expression, with its options.
        matrix: what is to be inverted.
        preconditioner: R -> P⁻¹ R, if given.
    """

    node: Inverse
    matrix: BoundMatrix
    preconditioner: Preconditioning | None = field(default=None, compare=False)

    @property
    def facts(self) -> Facts:
        """Of the matrix, given the loss."""
        return self.matrix.facts

    @property
    def problem(self) -> Problem:
        """Restricted already where the inverse is inside a restriction."""
        return self.matrix.problem

    @property
    def rtol(self) -> float:
        """Relative tolerance; by default what fits the dtypes of the problem."""
        return default_rtol(self.problem) if self.node.rtol is None else float(self.node.rtol)

    @property
    def noise(self) -> float:
        """ε of the residuals ε ‖A‖ ‖x‖ that count as rounding of the products; 0 where a tolerance was asked for by name."""
        return 0.0 if self.demanding else noise(self.problem)

    @property
    def demanding(self) -> bool:
        """Whether a tolerance was asked for by name."""
        return self.node.rtol is not None or self.node.atol > 0

    @property
    def maxiter(self) -> int:
        """The most iterations."""
        return self.node.maxiter or min(10 * self.matrix.size, 10_000)


class Solver(ABC):
    """A strategy that accepted.

    Attributes:
        name: of the strategy.
        cost: in words, for ``explain()``.
        iterative: whether it is only accurate to a tolerance, and so no fixed linear map.
        lines: more for ``explain()``.
    """

    name: str
    cost: str
    iterative: bool = False
    lines: Sequence[str] = ()

    @abstractmethod
    def solve(
        self, snapshot: Snapshot, b: Tensor, x0: Tensor | None, trail: Trail | None = None, report: bool = True
    ) -> SolveResult:
        """A⁻¹ B for right-hand sides (n, K); without a report, residuals that took a product of their own are NaN."""

    def approximate(self, snapshot: Snapshot, b: Tensor) -> Tensor:
        """A⁻¹ B as a preconditioner takes it: one fixed linear map, not checked."""
        return self.solve(snapshot, b, None, report=False).x

    def oaths(self, snapshot: Snapshot) -> list[Oath]:
        """What structures have proved there until now."""
        return []


class Direct(Solver):
    """A structured form, made at the first solve and kept.

    At each snapshot it proves itself once, on random vectors (:mod:`curvalg.lowering.inverses.verified`), and is believed
    then, or at once with ``Problem(verify=False)``: products cost no look at residuals, unless a tolerance was asked for by
    name. Solves that report refine x against the true residual and are right where that meets the tolerance, or is rounding
    alone. A form that fails has to meet the tolerance each time.

    Args:
        request: the inverse.
        form: of the matrix.
    """

    REFINEMENTS = 3
    _warned = False

    def __init__(self, request: InverseRequest, form: Form) -> None:
        self.request, self.form, self.name, self.cost = request, form, form.name, form.cost
        if request.preconditioner is not None:
            self.cost += "; the preconditioner is not needed"
        self._oaths: WeakKeyDictionary[Snapshot, Oath] = WeakKeyDictionary()

    def solve(
        self, snapshot: Snapshot, b: Tensor, x0: Tensor | None, trail: Trail | None = None, report: bool = True
    ) -> SolveResult:
        """A⁻¹ B; a starting point changes nothing."""
        structure, oath, unit = self.form.at(snapshot), self._sworn(snapshot, b), exponents(b)
        b = scaled(b, -unit)
        x, iterations = structure.solve(b), torch.zeros_like(unit, dtype=torch.int64)
        if oath.solves and not report and not self.request.demanding:
            converged = torch.isfinite(x).all(0)
            residual, reason = torch.full_like(b[0], torch.nan), OVERFLOW
        else:
            x, residual, converged = self._refined(snapshot, b, x, oath, unit)
            reason = f"refinement stalled in {b.dtype}"
        x = scaled(x, unit)
        converged &= torch.isfinite(x).all(0)
        above = residual > self._tolerance(b, unit)  # nowhere where no residual was looked at
        self._warn(converged & above, residual, b)
        reasons = tuple(
            (ROUNDING if high else CONVERGED) if ok else reason
            for ok, high in zip(converged.tolist(), above.tolist(), strict=True)
        )
        return SolveResult(x, converged, iterations, scaled(residual, unit), reasons)

    def _refined(
        self, snapshot: Snapshot, b: Tensor, x: Tensor, oath: Oath, unit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x with the smallest residual that refinement reaches; the norms; which of them will do."""
        request, structure = self.request, self.form.at(snapshot)
        tolerance = self._tolerance(b, unit)
        r = b - request.matrix.plan.apply(snapshot, x)
        best = r.norm(dim=0)
        for _ in range(self.REFINEMENTS):
            if bool((best <= tolerance).all()):
                break
            new = x + structure.solve(r)
            residual = b - request.matrix.plan.apply(snapshot, new)
            norms = residual.norm(dim=0)
            better = (norms < best) | ~torch.isfinite(best)
            x, r, best = torch.where(better, new, x), torch.where(better, residual, r), torch.where(better, norms, best)
            if not bool(better.any()):
                break
        return x, best, torch.isfinite(best) & ((best <= tolerance) | oath.accepts(x, b, r))

    def _tolerance(self, b: Tensor, unit: Tensor) -> Tensor:
        """What residuals of B, scaled by powers of two, are to be below."""
        atol = scaled(torch.full_like(b[:1], float(self.request.node.atol)), -unit)[0]
        tolerance: Tensor = atol + self.request.rtol * b.norm(dim=0)
        return tolerance

    def _warn(self, accepted: Tensor, residual: Tensor, b: Tensor) -> None:
        """Say so once where solves that rounding excuses have left much of b, and the matrix was built by products.

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

    def _sworn(self, snapshot: Snapshot, like: Tensor) -> Oath:
        if snapshot not in self._oaths:
            problem, structure = self.request.problem, self.form.at(snapshot)
            if not problem.verify:
                self._oaths[snapshot] = trusted(structure, like, epsilon(problem))
            else:
                self._oaths[snapshot] = swear(
                    structure,
                    lambda x: self.request.matrix.plan.apply(snapshot, x),
                    like,
                    epsilon(problem),
                    self.REFINEMENTS,
                )
        return self._oaths[snapshot]

    def oaths(self, snapshot: Snapshot) -> list[Oath]:
        return [self._oaths[snapshot]] if snapshot in self._oaths else []

    def approximate(self, snapshot: Snapshot, b: Tensor) -> Tensor:
        """A⁻¹ B without refinement."""
        return self.form.at(snapshot).solve(b)


class Iterative(Solver):
    """A Krylov method on products.

    Args:
        request: the inverse.
        name: of the strategy.
        method: the kernel.
    """

    def __init__(self, request: InverseRequest, name: str, method: Callable[..., SolveResult]) -> None:
        self.request, self.name, self.method = request, name, method
        self.iterative = True
        helped = " preconditioned" if request.preconditioner else ""
        self.cost = f"at most {request.maxiter}{helped} products to a relative residual of {request.rtol:g}"

    def solve(
        self, snapshot: Snapshot, b: Tensor, x0: Tensor | None, trail: Trail | None = None, report: bool = True
    ) -> SolveResult:
        """A⁻¹ B from a starting point."""
        request = self.request
        preconditioner = request.preconditioner
        return self.method(
            lambda x: request.matrix.plan.apply(snapshot, x),
            b,
            x0=x0,
            preconditioner=None if preconditioner is None else lambda r: preconditioner(snapshot, r),
            rtol=request.rtol,
            atol=float(request.node.atol),
            maxiter=request.maxiter,
            trail=trail,
            noise=request.noise,
        )


Strategy = Callable[[InverseRequest], Solver | str]


def _form(name: str) -> Strategy:
    def strategy(request: InverseRequest) -> Solver | str:
        offer = FORMS[name](request.matrix)
        if not isinstance(offer, Form):
            return offer
        if offer.singular is not None:
            raise FactsError(f"{request.node.expr} has no inverse: {offer.singular}; add damping, c * Identity")
        return Direct(request, offer)

    return strategy


class ByBlocks(Solver):
    """One solver for each block of a block-diagonal matrix; ‖r‖² is the sum over blocks, so their tolerances carry over.

    Args:
        request: the inverse.
        parts: (where it lies, names, solver, its chain).
    """

    name = "blocks"

    def __init__(self, request: InverseRequest, parts: Sequence[tuple[RowRanges, str, Solver, list[str]]]) -> None:
        self.request, self.parts = request, parts
        self.iterative = any(solver.iterative for _, _, solver, _ in parts)
        counts: dict[str, int] = {}
        for _, _, solver, _ in parts:
            counts[solver.name] = counts.get(solver.name, 0) + 1
        self.cost = f"{len(parts)} blocks, {', '.join(f'{n} by {name}' for name, n in counts.items())}"
        self.lines = alike([(label, chain) for _, label, _, chain in parts])

    def solve(
        self, snapshot: Snapshot, b: Tensor, x0: Tensor | None, trail: Trail | None = None, report: bool = True
    ) -> SolveResult:
        """A⁻¹ B, block by block."""
        x = torch.zeros_like(b)
        residual = b.new_zeros(b.shape[1])
        converged = torch.ones_like(residual, dtype=torch.bool)
        iterations = torch.zeros_like(converged, dtype=torch.int64)
        reasons = ["converged"] * b.shape[1]
        partial = False
        for number, (places, label, solver, _) in enumerate(self.parts):
            if partial:
                converged[:] = False
                reasons = [f"{INTERRUPTED} before the block over {label}"] * len(reasons)
                break
            start = None if x0 is None else places.take(x0)
            own = None if trail is None else trail.part(number)
            part = solver.solve(snapshot, places.take(b), start, own, report)
            partial = part.partial
            places.put(x, part.x)
            residual = torch.hypot(residual, part.residual)  # which squares nothing that could overflow
            converged &= part.converged
            iterations = torch.maximum(iterations, part.iterations)
            for column, ok in enumerate(part.converged.tolist()):
                if not ok:
                    reasons[column] = f"the block over {label}: {part.reason[column]}"
        return SolveResult(x, converged, iterations, residual, tuple(reasons), partial=partial)

    def oaths(self, snapshot: Snapshot) -> list[Oath]:
        return [oath for _, _, solver, _ in self.parts for oath in solver.oaths(snapshot)]

    def approximate(self, snapshot: Snapshot, b: Tensor) -> Tensor:
        """A⁻¹ B, block by block."""
        x = torch.zeros_like(b)
        for places, _, solver, _ in self.parts:
            places.put(x, solver.approximate(snapshot, places.take(b)))
        return x


def _blocks(request: InverseRequest) -> Solver | str:
    blocks = matrix_blocks(request.matrix)
    if isinstance(blocks, str):
        return blocks
    options = {**request.node.options, "solver": "auto", "preconditioner": None}
    # ‖r‖ ≤ atol over all blocks where each keeps its part.
    options["atol"] = request.node.atol / len(blocks) ** 0.5
    parts: list[tuple[RowRanges, str, Solver, list[str]]] = []
    for places, block, label in blocks:
        if isinstance(block.expr, ZeroExpr):
            raise FactsError(
                f"the blocks leave out {label}, where the matrix is zero, so it has no inverse; add damping, c * Identity"
            )
        node = Inverse(block.expr, **options)
        solver, chain = choose(replace(request, node=node, matrix=block, preconditioner=None))
        parts.append((places, label, solver, chain))
    solver = ByBlocks(request, parts)
    if solver.iterative and request.preconditioner is not None:
        return "a block needs an iterative solver, and the preconditioner is for the whole matrix"
    return solver


def _cg(request: InverseRequest) -> Solver | str:
    forced = request.node.solver == "cg" and request.facts.symmetric is not False
    if forced or request.facts.positive_definite:
        return Iterative(request, "cg", cg)
    return f"positive definiteness is {_tri(request.facts.positive_definite)}"


def _minres(request: InverseRequest) -> Solver | str:
    if request.facts.symmetric or (request.node.solver == "minres" and request.facts.symmetric is None):
        return Iterative(request, "minres", minres)
    return f"symmetry is {_tri(request.facts.symmetric)}"


def _tri(value: bool | None) -> str:
    return {True: "proved", False: "refuted", None: "not proved"}[value]


STRATEGIES: dict[str, Strategy] = {
    **{name: _form(name) for name in FORMS},
    "blocks": _blocks,  # unlike the form, also where a block needs an iterative solver
    "cg": _cg,
    "minres": _minres,
}
"""All strategies, in the order in which they are tried."""


def choose(request: InverseRequest) -> tuple[Solver, list[str]]:
    """The first strategy that accepts, and a line for each one tried.

    Raises:
        FactsError: none accepts; says which fact is missing.
    """
    asked = request.node.solver
    chain: list[str] = []
    request = replace(request, matrix=request.matrix.localised())
    for name, strategy in STRATEGIES.items():
        if asked not in ("auto", name):
            continue
        outcome = strategy(request)
        if isinstance(outcome, Solver):
            return outcome, [*chain, f"{name}: chosen, {outcome.cost}", *indent(outcome.lines)]
        chain.append(f"{name}: declined, {outcome}")
    raise FactsError(
        f"no solver for inverse({request.node.expr}): {'; '.join(chain)}. A positive term and damping (+ c * Identity) make a "
        "matrix positive definite; block_diagonal() or restrict() make it smaller"
    )

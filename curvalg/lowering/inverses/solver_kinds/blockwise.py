"""Solves block by block, each block in its own way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvalg.lowering.blocks.rows import RowRanges, by_blocks
from curvalg.lowering.inverses.kronecker_spectra import decompose_together
from curvalg.lowering.inverses.solver import InverseRequest, Solver
from curvalg.lowering.inverses.solver_kinds.structured import Structured
from curvalg.lowering.inverses.verified import Oath
from curvalg.lowering.lines import alike
from curvalg.problem import Snapshot
from curvalg.problem.kept.reads import Reads, together
from curvalg.solve import SolveResult
from curvalg.solve.trail import INTERRUPTED, Trail


class ByBlocks(Solver[list[Any]]):
    """One solver for each block of a block-diagonal matrix; ‖r‖² is the sum over blocks, so their tolerances carry over.

    Args:
        request: the inverse.
        parts: (where it lies, names, solver, its chain).
    """

    name = "blocks"

    def __init__(self, request: InverseRequest, parts: Sequence[tuple[RowRanges, str, Solver[Any], list[str]]]) -> None:
        self.request, self.parts = request, parts
        self._rows = [places for places, _, _, _ in parts]
        self.iterative = any(solver.iterative for _, _, solver, _ in parts)
        counts: dict[str, int] = {}
        for _, _, solver, _ in parts:
            counts[solver.name] = counts.get(solver.name, 0) + 1
        self.cost = f"{len(parts)} blocks, {', '.join(f'{n} by {name}' for name, n in counts.items())}"
        self.lines = alike([(label, chain) for _, label, _, chain in parts])

    def prepare(self, snapshot: Snapshot) -> list[Any]:
        solvers = [solver for _, _, solver, _ in self.parts]
        forms = [solver.form for solver in solvers if isinstance(solver, Structured)]
        decompose_together(tuple(wanted for form in forms for wanted in form.spectra), snapshot)
        return [solver.prepare(snapshot) for solver in solvers]

    def solve(
        self, state: list[Any], b: Tensor, x0: Tensor | None, trail: Trail | None = None, report: bool = True
    ) -> SolveResult:
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
            part = solver.solve(state[number], places.take(b), start, own, report)
            partial = part.partial
            places.put(x, part.x)
            residual = torch.hypot(residual, part.residual)  # which squares nothing that could overflow
            converged &= part.converged
            iterations = torch.maximum(iterations, part.iterations)
            for column, ok in enumerate(part.converged.tolist()):
                if not ok:
                    reasons[column] = f"the block over {label}: {part.reason[column]}"
        return SolveResult(x, converged, iterations, residual, tuple(reasons), partial=partial)

    def oaths(self, state: list[Any]) -> list[Oath]:
        return [oath for (_, _, solver, _), own in zip(self.parts, state) for oath in solver.oaths(own)]

    def trusts(self, state: list[Any]) -> bool:
        return all(solver.trusts(own) for (_, _, solver, _), own in zip(self.parts, state, strict=True))

    def apply(self, state: list[Any], b: Tensor) -> Tensor:
        return by_blocks(self._rows, b, lambda i, part: self.parts[i][2].apply(state[i], part))

    def reads(self, state: list[Any]) -> Reads | str:
        return together(solver.reads(own) for (_, _, solver, _), own in zip(self.parts, state, strict=True))

    def approximate(self, state: list[Any], b: Tensor) -> Tensor:
        return by_blocks(self._rows, b, lambda i, part: self.parts[i][2].approximate(state[i], part))

"""Iterative solves by products alone: a Krylov method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from curvalg.lowering.inverses.solver import InverseRequest, Solver
from curvalg.lowering.replayed import Repeatable, replayed
from curvalg.problem import Snapshot
from curvalg.solve import SolveResult
from curvalg.solve.trail import Trail


@dataclass(frozen=True)
class Operators:
    """The products that a Krylov method takes at one state.

    Args:
        matrix: A, whose products may be replayed.
        multiply: X -> A X.
        precondition: R -> P⁻¹ R, or None.
    """

    matrix: Repeatable
    multiply: Callable[[Tensor], Tensor]
    precondition: Callable[[Tensor], Tensor] | None


class Iterative(Solver[Operators]):
    """A Krylov method on products.

    Args:
        request: the inverse.
        name: of the solver.
        method: the kernel.
    """

    def __init__(self, request: InverseRequest, name: str, method: Callable[..., SolveResult]) -> None:
        self.request, self.name, self.method = request, name, method
        self.iterative = True
        helped = " preconditioned" if request.preconditioner else ""
        self.cost = f"at most {request.maxiter}{helped} products to a relative residual of {request.rtol:g}"

    def prepare(self, snapshot: Snapshot) -> Operators:
        matrix, preconditioner = self.request.matrix, self.request.preconditioner
        plan = replayed(matrix.problem, matrix.plan)
        return Operators(
            plan,
            lambda x: plan.apply(snapshot, x),
            None if preconditioner is None else lambda r: preconditioner(snapshot, r),
        )

    def multiplies(self, state: Operators) -> Repeatable:
        return state.matrix

    def solve(
        self, state: Operators, b: Tensor, x0: Tensor | None, trail: Trail | None = None, report: bool = True
    ) -> SolveResult:
        request = self.request
        expected = request.matrix.problem.measured.expected
        with expected.at_most(request.maxiter * b.shape[1]):
            return self.method(
                state.multiply,
                b,
                x0=x0,
                preconditioner=state.precondition,
                rtol=request.rtol,
                atol=float(request.node.atol),
                maxiter=request.maxiter,
                trail=trail,
                noise=request.noise,
                rounding=request.rounding,
                space=request.matrix.vectors,
            )

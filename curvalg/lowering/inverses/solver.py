"""The contract of a solver: made for a matrix, prepared once at each state, and asked for solves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

from curvalg.expr import Facts, Inverse
from curvalg.lowering.inverses.offer import BoundMatrix
from curvalg.lowering.inverses.rounding import default_rtol, epsilon, noise
from curvalg.lowering.inverses.verified import Oath
from curvalg.lowering.replayed import Repeatable
from curvalg.problem import Problem, Snapshot
from curvalg.problem.kept.reads import Reads
from curvalg.solve import SolveResult
from curvalg.solve.trail import Trail

State = TypeVar("State")

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
        """The facts of the matrix, given the loss."""
        return self.matrix.facts

    @property
    def problem(self) -> Problem:
        """The problem, restricted already where the inverse is inside a restriction."""
        return self.matrix.problem

    @property
    def rtol(self) -> float:
        """The relative tolerance; by default what fits the dtypes of the problem."""
        return default_rtol(self.problem) if self.node.rtol is None else float(self.node.rtol)

    @property
    def noise(self) -> float:
        """The ε of residuals ε ‖A‖ ‖x‖ that count as rounding of the products; 0 where a tolerance was asked for by name."""
        return 0.0 if self.demanding else noise(self.problem)

    @property
    def rounding(self) -> float:
        """The ε of products by which an iterative solve that stagnates is right; 0 where a tolerance was asked for by name."""
        return 0.0 if self.demanding else epsilon(self.problem)

    @property
    def demanding(self) -> bool:
        """Whether a tolerance was asked for by name."""
        return self.node.rtol is not None or self.node.atol > 0

    @property
    def unchecked(self) -> str:
        """The option by which a structured form is believed without a comparison; empty where it has to prove itself."""
        if not self.problem.verify:
            return "verify=False"
        return "" if self.node.check else "check=False"

    @property
    def maxiter(self) -> int:
        """The largest number of iterations."""
        return self.node.maxiter or min(10 * self.matrix.vectors.size, 10_000)


class Solver(ABC, Generic[State]):
    """A way to solve that accepted a matrix.

    Attributes:
        name: of the solver.
        cost: in words, for ``explain()``.
        iterative: whether it is only accurate to a tolerance, and so no fixed linear map.
        lines: more for ``explain()``.
    """

    name: str
    cost: str
    iterative: bool = False
    lines: Sequence[str] = ()

    @abstractmethod
    def prepare(self, snapshot: Snapshot) -> State:
        """Prepare what solves at a snapshot share: factorisations, products."""

    @abstractmethod
    def solve(
        self, state: State, b: Tensor, x0: Tensor | None, trail: Trail | None = None, report: bool = True
    ) -> SolveResult:
        """Solve A X = B for right-hand sides (n, K).

        Args:
            state: what :meth:`prepare` gave.
            b: B.
            x0: where iterations start.
            trail: is called with iterates, and may interrupt.
            report: without one, residuals that took a product of their own are NaN.
        """

    def trusts(self, state: State) -> bool:
        """Whether :meth:`apply` needs no look at what it gives."""
        return False

    def apply(self, state: State, b: Tensor) -> Tensor:
        """A⁻¹ B for right-hand sides (n, K), without a report, where the solver trusts itself."""
        return self.solve(state, b, None, report=False).x

    def reads(self, state: State) -> Reads | str:
        """What :meth:`apply` reads from kept memory, or why its kernels are not the same each time."""
        return "since solves are not of a fixed form"

    def multiplies(self, state: State) -> Repeatable | None:
        """The matrix as the solver multiplies with it, where it takes products of its own."""
        return None

    def approximate(self, state: State, b: Tensor) -> Tensor:
        """Apply A⁻¹ as a preconditioner takes it: one fixed linear map, not checked."""
        return self.solve(state, b, None, report=False).x

    def oaths(self, state: State) -> list[Oath]:
        """The proofs of structures until now."""
        return []

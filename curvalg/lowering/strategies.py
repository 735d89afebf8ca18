"""Strategies for an inverse, tried in order; each gives a solver with its cost, or the reason why it declines.

Laws change an expression without a thought; strategies are numerical choices. A newcomer is one function and one row of
``STRATEGIES``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from curvalg.errors import FactsError
from curvalg.expr import Diagonal, Expr, Facts, IdentityExpr, Inverse, Sum
from curvalg.lowering.leaves import tensor
from curvalg.problem import Problem, Snapshot
from curvalg.solve import SolveResult, cg, factorize, minres

DENSE_LIMIT = 4096
"""The most rows of a matrix that is built and factorised."""


class Product(Protocol):
    """What a strategy may do with the matrix: multiply."""

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        """The product with x (n, K)."""
        ...


Preconditioning = Callable[[Snapshot, Tensor], Tensor]
"""R (n, K) -> P⁻¹ R."""


@dataclass(frozen=True)
class Request:
    """An inverse to be planned.

    Args:
        node: the expression, with its options.
        facts: of the matrix inside, given the loss.
        problem: restricted already where the inverse is inside a restriction.
        size: number of rows.
        matrix: the plan of the matrix.
        preconditioner: R -> P⁻¹ R, if given.
    """

    node: Inverse
    facts: Facts
    problem: Problem
    size: int
    matrix: Product
    preconditioner: Preconditioning | None = field(default=None, compare=False)

    @property
    def rtol(self) -> float:
        """Relative tolerance; by default 1e-5 in float32 and 1e-8 in float64."""
        if self.node.rtol is not None:
            return float(self.node.rtol)
        return 1e-8 if self.problem.dtype == torch.float64 else 1e-5

    @property
    def maxiter(self) -> int:
        """The most iterations."""
        return self.node.maxiter or min(10 * self.size, 10_000)


class Solver(ABC):
    """A strategy that accepted.

    Attributes:
        name: of the strategy.
        cost: in words, for ``explain()``.
    """

    name: str
    cost: str

    @abstractmethod
    def solve(self, snapshot: Snapshot, b: Tensor, x0: Tensor | None) -> SolveResult:
        """A⁻¹ B for right-hand sides (n, K)."""


class Direct(Solver):
    """A factorisation, made at the first solve and kept, with iterative refinement against the true residual.

    Args:
        request: the inverse.
        name: of the strategy.
        cost: in words.
        factor: snapshot -> (B -> A⁻¹ B).
    """

    REFINEMENTS = 3

    def __init__(
        self, request: Request, name: str, cost: str, factor: Callable[[Snapshot], Callable[[Tensor], Tensor]]
    ) -> None:
        if request.preconditioner is not None:
            cost += "; the preconditioner is not needed"
        self.request, self.name, self.cost, self._factor = request, name, cost, factor
        # Lives with the plan, and so with the operator: dampings tried one after the other do not pile up.
        self._kept: WeakKeyDictionary[Snapshot, Callable[[Tensor], Tensor]] = WeakKeyDictionary()

    def solve(self, snapshot: Snapshot, b: Tensor, x0: Tensor | None) -> SolveResult:
        """A⁻¹ B; a starting point changes nothing."""
        request = self.request
        if snapshot not in self._kept:
            self._kept[snapshot] = self._factor(snapshot)
        apply = self._kept[snapshot]
        tolerance = request.node.atol + request.rtol * b.norm(dim=0)
        x, r = torch.zeros_like(b), b
        best = torch.full_like(tolerance, torch.inf)
        for _ in range(1 + self.REFINEMENTS):
            new = x + apply(r)
            residual = b - request.matrix.apply(snapshot, new)
            norms = residual.norm(dim=0)
            better = norms < best
            x, r = torch.where(better, new, x), torch.where(better, residual, r)
            stalled = not bool(better.any())
            best = torch.minimum(norms, best)
            if stalled or bool((best <= tolerance).all()):
                break
        converged = best <= tolerance
        reasons = tuple("converged" if ok else f"refinement stalled in {b.dtype}" for ok in converged.tolist())
        return SolveResult(x, converged, torch.zeros_like(converged, dtype=torch.int64), best, reasons)


class Iterative(Solver):
    """A Krylov method on products.

    Args:
        request: the inverse.
        name: of the strategy.
        method: the kernel.
    """

    def __init__(self, request: Request, name: str, method: Callable[..., SolveResult]) -> None:
        self.request, self.name, self.method = request, name, method
        helped = " preconditioned" if request.preconditioner else ""
        self.cost = f"at most {request.maxiter}{helped} products to a relative residual of {request.rtol:g}"

    def solve(self, snapshot: Snapshot, b: Tensor, x0: Tensor | None) -> SolveResult:
        """A⁻¹ B from a starting point."""
        request = self.request
        preconditioner = request.preconditioner
        return self.method(
            lambda x: request.matrix.apply(snapshot, x),
            b,
            x0=x0,
            preconditioner=None if preconditioner is None else lambda r: preconditioner(snapshot, r),
            rtol=request.rtol,
            atol=float(request.node.atol),
            maxiter=request.maxiter,
        )


Strategy = Callable[[Request], Solver | str]


def _diagonal(request: Request) -> Solver | str:
    parts = _diagonal_parts(request.node.expr)
    if parts is None:
        return "the matrix is not made of diagonals and the identity"
    diagonals, shift = parts

    def factor(snapshot: Snapshot) -> Callable[[Tensor], Tensor]:
        like = torch.empty(0, dtype=torch.float64, device=request.problem.device)
        values = sum((c * tensor(d.values, like) for d, c in diagonals), like.new_full((request.size,), shift))
        if bool((values == 0).any()):
            raise FactsError(
                f"{request.node.expr} has {int((values == 0).sum())} zeros on its diagonal, so it has no inverse; add "
                "damping, c * Identity"
            )
        return lambda b: (b.double() / values[:, None]).to(b.dtype)

    return Direct(request, "diagonal", "a division", factor)


def _diagonal_parts(expr: Expr) -> tuple[list[tuple[Diagonal, float]], float] | None:
    if isinstance(expr, IdentityExpr):
        return [], 1.0
    if isinstance(expr, Diagonal):
        return [(expr, 1.0)], 0.0
    if isinstance(expr, Sum) and all(isinstance(part, Diagonal) for part in expr.coefficients):
        return [(part, float(c)) for part, c in expr.coefficients.items() if isinstance(part, Diagonal)], float(
            expr.shift
        )
    return None


def _dense(request: Request) -> Solver | str:
    n = request.size
    if n > DENSE_LIMIT:
        return f"{n} rows are more than {DENSE_LIMIT}"

    def factor(snapshot: Snapshot) -> Callable[[Tensor], Tensor]:
        problem = request.problem
        eye = torch.eye(n, dtype=problem.dtype, device=problem.device)
        columns = [request.matrix.apply(snapshot, eye[:, at : at + 256]) for at in range(0, n, 256)]
        matrix = torch.cat(columns, 1).double()
        if request.facts.symmetric:
            matrix = (matrix + matrix.T) / 2
        apply = factorize(matrix, positive_definite=request.facts.positive_definite)
        return lambda b: apply(b.double()).to(b.dtype)

    kind = "Cholesky" if request.facts.positive_definite else "LU"
    cost = f"{n} products once, then a {kind} factorisation of {n**2 * 8 / 2**20:.3g} MiB"
    return Direct(request, "dense", cost, factor)


def _cg(request: Request) -> Solver | str:
    forced = request.node.solver == "cg" and request.facts.symmetric is not False
    if forced or request.facts.positive_definite:
        return Iterative(request, "cg", cg)
    return f"positive definiteness is {_tri(request.facts.positive_definite)}"


def _minres(request: Request) -> Solver | str:
    if request.facts.symmetric or (request.node.solver == "minres" and request.facts.symmetric is None):
        return Iterative(request, "minres", minres)
    return f"symmetry is {_tri(request.facts.symmetric)}"


def _tri(value: bool | None) -> str:
    return {True: "proved", False: "refuted", None: "not proved"}[value]


STRATEGIES: dict[str, Strategy] = {"diagonal": _diagonal, "dense": _dense, "cg": _cg, "minres": _minres}
"""All strategies, in the order in which they are tried."""


def choose(request: Request) -> tuple[Solver, list[str]]:
    """The first strategy that accepts, and a line for each one tried.

    Raises:
        FactsError: none accepts; says which fact is missing.
    """
    asked = request.node.solver
    chain: list[str] = []
    for name, strategy in STRATEGIES.items():
        if asked not in ("auto", name):
            continue
        outcome = strategy(request)
        if isinstance(outcome, Solver):
            return outcome, [*chain, f"{name}: chosen, {outcome.cost}"]
        chain.append(f"{name}: declined, {outcome}")
    raise FactsError(
        f"no solver for inverse({request.node.expr}): {'; '.join(chain)}. A positive term and damping (+ c * Identity) make a "
        "matrix positive definite; block_diagonal() or restrict() make it smaller"
    )

"""Book-keeping that the iterative solvers share: columns that end are frozen, the others go on in smaller products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvalg.solve.powers import exponents, scaled
from curvalg.solve.solve_result import CONVERGED, Matmul, SolveResult
from curvalg.solve.trail import INTERRUPTED, Mark, Trail

STAGNATED = "stagnated: the true residual no longer falls (raise rtol= or use float64)"
RUNAWAY = "the true residual left its estimate: the matrix is singular or nearly so"
OVERFLOW = "the residual or the solution is not finite (out of range of the dtype, or of a matrix that is not finite)"


def same(r: Tensor) -> Tensor:
    """The residuals themselves, for solves without a preconditioner."""
    return r


class ScaledMap:
    """A linear map in a unit of its own, the power of two that its first product asks for.

    Conjugate gradients and MINRES take a multiple of the matrix or of the preconditioner for the same one, down to the last
    bit as long as it is a power of two; what it spares them are inner products that leave the range of the dtype.

    Args:
        matmul: X -> A X.
        measured: whether to keep a lower bound of ‖A‖.
    """

    def __init__(self, matmul: Matmul, measured: bool = False) -> None:
        self._matmul, self._measured = matmul, measured
        self.size = 0.0
        """The largest ‖A x‖ / ‖x‖ so far, in this unit."""
        self.exponent: int | None = None
        """e, once it is known: calls give 2^−e A X."""

    def __call__(self, x: Tensor) -> Tensor:
        product = self._matmul(x)
        if self.exponent is None and bool((some := (product != 0).any(0)).any()):
            self.exponent = int((exponents(product) - exponents(x))[some].amax())
        if self.exponent:
            half = self.exponent // 2  # in two steps, as the power itself may be out of range
            product = product * 2.0**-half * 2.0 ** (half - self.exponent)
        if self._measured:
            ratio = product.norm(dim=0) / x.norm(dim=0)
            self.size = max(self.size, float(ratio.nan_to_num(0.0, 0.0).amax()))
        return product


_WRITTEN = ("best", "residual", "iterations", "refuted", "active")
"""What the book-keeping writes into in place."""


_UNKNOWN = -(2**20)
"""Stands in a mark for the unit of a map that has given nothing but zeros so far."""


class OpenColumns:
    """The columns of A X = B that are still being solved, in units in which A and every column of B are near one.

    All that is done and remembered in between is in these units; the report is in the user's.

    Args:
        matmul: X -> A X.
        b: right-hand sides (n, K).
        x0: starting point (n, K), or None for zero.
        rtol: relative to ‖b‖.
        atol: absolute; a column has converged when ‖b − A x‖ ≤ atol + rtol ‖b‖.
        preconditioner: R -> P⁻¹ R, if there is one.
        noise: relative error of products, whose part in a residual, noise ‖A‖ ‖x‖, does not count.
    """

    MOST_CONFIRMATIONS = 5
    """How often a column may claim convergence and be refuted by its true residual before it counts as stagnated."""

    def __init__(
        self,
        matmul: Matmul,
        b: Tensor,
        x0: Tensor | None,
        rtol: float,
        atol: float,
        preconditioner: Matmul | None = None,
        noise: float = 0.0,
    ) -> None:
        self.unit = exponents(b)
        self.matmul, self.apply = ScaledMap(matmul, measured=noise > 0), ScaledMap(preconditioner or same)
        self.noise = noise
        self.b = scaled(b, -self.unit)
        self.tolerance = scaled(torch.full_like(self.b[:1], atol), -self.unit)[0] + rtol * self.b.norm(dim=0)
        self.best = torch.zeros_like(b)
        self.residual = self.b.norm(dim=0)
        if x0 is not None and bool(x0.any()):
            start = scaled(x0, -self.unit)
            product = self.matmul(start)
            exponent = torch.full_like(self.unit, self.matmul.exponent or 0)
            self.best = scaled(start, exponent)
            self.residual = (self.b - scaled(product, exponent)).norm(dim=0)
        self.iterations = torch.zeros(b.shape[1], dtype=torch.int64, device=b.device)
        self.reasons: list[str | None] = [None] * b.shape[1]
        self.refuted = torch.zeros_like(self.iterations)
        self.active = torch.arange(b.shape[1], device=b.device)
        self._history = [self.residual.clone()]

    def mark(self, step: int, **tensors: Tensor) -> Mark:
        """The state before an iteration, with the tensors of the method."""
        # Copies of what is written into in place.
        own = {name: getattr(self, name).clone() for name in _WRITTEN}
        of_maps = [_UNKNOWN if unit.exponent is None else unit.exponent for unit in (self.matmul, self.apply)]
        own["units"] = torch.cat([self.unit, self.unit.new_tensor(of_maps)])
        own["size"] = torch.tensor([self.matmul.size], dtype=torch.float64, device="cpu")
        numbers = {"step": step, "reasons": list(self.reasons)}
        return Mark({**own, **tensors}, numbers, self._history, len(self._history))

    def resume(self, mark: Mark) -> int:
        """Go back to a state; the iteration that comes next."""
        for name in _WRITTEN:
            setattr(self, name, mark.tensors[name].to(self.b.device).clone())
        for unit, exponent in zip((self.matmul, self.apply), mark.tensors["units"][-2:].tolist(), strict=True):
            unit.exponent = None if exponent == _UNKNOWN else int(exponent)
        self.matmul.size = float(mark.tensors["size"])
        self._history = [norms.to(self.b.device) for norms in mark.history[: mark.length]]
        self.reasons = list(mark.numbers["reasons"])
        return int(mark.numbers["step"])

    def own(self, mark: Mark, *names: str) -> list[Tensor]:
        """The tensors of the method, on the device of the right-hand sides."""
        return [mark.tensors[name].to(self.b.device) for name in names]

    def start(self) -> tuple[Tensor, Tensor, Tensor]:
        """Start a solve: (positions kept, x, r) after freezing the columns that need no iteration."""
        kept = self.freeze((self.residual <= self.tolerance) & torch.isfinite(self.residual), CONVERGED)
        x = self.best[:, self.active].clone()
        r = self.b[:, self.active] if not bool(x.any()) else self.b[:, self.active] - self.matmul(x)
        return kept, x, r

    def meets(self, x: Tensor, norms: Tensor, columns: Tensor, factor: Tensor | float = 1.0) -> Tensor:
        """The mask of residual norms of iterates x that meet the tolerance, times a factor, or are rounding of products."""
        tolerance = factor * self.tolerance[columns]
        if self.noise:
            tolerance = tolerance + self.noise * self.matmul.size * x.norm(dim=0)
        met: Tensor = torch.isfinite(norms) & (norms <= tolerance)
        return met

    def freeze(self, ended: Tensor, reason: str) -> Tensor:
        """End some of the active columns; positions (among the active ones) of those that go on."""
        for column in self.active[ended].tolist():
            self.reasons[column] = reason
        kept = torch.nonzero(~ended).reshape(-1)
        self.active = self.active[kept]
        return kept

    def count(self) -> None:
        """Count one more iteration of the active columns."""
        self.iterations[self.active] += 1

    def record(self, norms: Tensor) -> None:
        """Remember the residual norms of the active columns, by the recurrence, after one more iteration."""
        self._history.append(self._history[-1].index_copy(0, self.active, norms))

    def observe(self, x: Tensor, norms: Tensor) -> None:
        """Remember the iterates of the active columns whose residual norm is the smallest so far."""
        better = norms < self.residual[self.active]
        if bool(better.any()):
            columns = self.active[better]
            self.best[:, columns] = x[:, better]
            self.residual[columns] = norms[better]

    def confirm(self, x: Tensor, claims: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Check claims of convergence with the true residual.

        Args:
            x: iterates of the active columns.
            claims: which of them claim convergence, boolean.

        Returns:
            (converged, stagnated, true residuals of the claims), the first two boolean over the active columns.
        """
        true = self.b[:, self.active[claims]] - self.matmul(x[:, claims])
        norms = true.norm(dim=0)
        columns = self.active[claims]
        better = norms < self.residual[columns]
        self.best[:, columns[better]] = x[:, claims][:, better]
        self.residual[columns[better]] = norms[better]
        good = self.meets(x[:, claims], norms, columns)
        self.refuted[columns] += (~good).long()
        converged, stagnated = torch.zeros_like(claims), torch.zeros_like(claims)
        converged[claims] = good
        stagnated[claims] = ~good & (self.refuted[columns] >= self.MOST_CONFIRMATIONS)
        return converged, stagnated, true

    def audit(self, x: Tensor, estimates: Tensor) -> Tensor:
        """Compare estimated with true residual norms; which active columns' recurrences have lost the residual.

        The best iterates are remembered on the way.
        """
        norms = (self.b[:, self.active] - self.matmul(x)).norm(dim=0)
        before = self.residual[self.active]
        self.observe(x, norms)
        lost: Tensor = (norms > 100 * estimates) & (norms > 2 * before)
        return lost

    def settle(self, converged: Tensor, stagnated: Tensor) -> Tensor:
        """Freeze columns that converged or stagnated; positions of those that go on."""
        kept = torch.nonzero(~(converged | stagnated)).reshape(-1)
        self.freeze(stagnated, STAGNATED)
        self.freeze(converged[~stagnated], CONVERGED)
        return kept

    def result(self, rest: str) -> SolveResult:
        """The report; columns still active ended for the reason ``rest``. Residuals are recomputed."""
        self.freeze(torch.ones_like(self.active, dtype=torch.bool), rest)
        norms = (self.b - self.matmul(self.best)).norm(dim=0)
        x = scaled(self.best, self.unit - (self.matmul.exponent or 0))
        reasons = tuple(reason or rest for reason in self.reasons)
        # A residual that grew by rounding between two evaluations is still a solve; one that was never met is not.
        claimed = torch.tensor([reason == CONVERGED for reason in reasons], device=norms.device)
        finite = torch.isfinite(norms) & torch.isfinite(x).all(0)
        every = torch.arange(len(norms), device=norms.device)
        converged = finite & self.meets(self.best, norms, every, 1.0 + claimed)
        reasons = tuple(
            CONVERGED if ok else reason if sound and reason != CONVERGED else OVERFLOW
            for ok, sound, reason in zip(converged.tolist(), finite.tolist(), reasons, strict=True)
        )
        residual, history = scaled(norms, self.unit), scaled(torch.stack(self._history), self.unit)
        return SolveResult(x, converged, self.iterations, residual, reasons, history, rest == INTERRUPTED)


def ended(columns: OpenColumns, trail: Trail | None, iterate: Callable[[], None], maxiter: int) -> SolveResult:
    """The report of all iterations; with a trail, an interruption ends them at its last mark."""
    try:
        iterate()
    except KeyboardInterrupt:
        if trail is None or trail.last is None:
            raise
        columns.resume(trail.last)
        return columns.result(INTERRUPTED)
    return columns.result(f"{maxiter} iterations were not enough")

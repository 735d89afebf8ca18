"""Book-keeping that the iterative solvers share: columns that end are frozen, the others go on in smaller products."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvalg.solve.powers import exponents, scaled
from curvalg.solve.solve_result import CONVERGED, LARGE, ROUNDING, UNITS, Matmul, SolveResult
from curvalg.solve.trail import INTERRUPTED, Mark, Trail
from curvalg.tensors.spaces import VectorSpace
from curvalg.tensors.spaces.vector_space import space_of

STAGNATED = "stagnated: the true residual no longer falls (raise rtol= or use float64)"
RUNAWAY = "the true residual left its estimate: the matrix is singular or nearly so"
POWERS = 6
"""Products for a lower bound of ‖A‖, where a solve has stagnated."""
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
        space: that the columns are in.
        measured: whether to keep a lower bound of ‖A‖.
    """

    def __init__(self, matmul: Matmul, space: VectorSpace, measured: bool = False) -> None:
        self._matmul, self._space, self._measured = matmul, space, measured
        self._size: Tensor | float = 0.0
        self.exponent: int | None = None
        """e, once it is known: calls give 2^−e A X."""

    @property
    def size(self) -> float:
        """The largest ‖A x‖ / ‖x‖ so far, in this unit."""
        return float(self._size)

    @size.setter
    def size(self, value: float) -> None:
        self._size = value

    def __call__(self, x: Tensor) -> Tensor:
        product = self._scaled(x)
        if self._measured:
            self._compare(*self._space.joined(self._space.norms_part(product), self._space.norms_part(x)))
        return product

    def along(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The products A x with columns, and xᵀAx of each, (K,)."""
        product, space = self._scaled(x), self._space
        measures = (space.norms_part(product), space.norms_part(x)) if self._measured else ()
        inner, *norms = space.joined(space.dots_part(x, product), *measures)
        if norms:
            self._compare(*norms)
        return product, inner

    def _scaled(self, x: Tensor) -> Tensor:
        product, space = self._matmul(x), self._space
        if self.exponent is None and bool((some := space.anywhere(product != 0)).any()):
            self.exponent = int((exponents(product, space) - exponents(x, space))[some].amax())
        if self.exponent:
            half = self.exponent // 2  # in two steps, as the power itself may be out of range
            product = product * 2.0**-half * 2.0 ** (half - self.exponent)
        return product

    def _compare(self, of_product: Tensor, of_vector: Tensor) -> None:
        ratio = of_product / of_vector
        self._size = ratio.nan_to_num(0.0, 0.0).amax().clamp_min(self._size)


_COUNTED = ("best", "residual", "iterations", "refuted", "active")
"""The state of the book-keeping."""


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
        space: that the columns are in, which are whole by default.
        rounding: ε of products; a column that stagnates where no x leaves less than they do has converged. 0: it has not.
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
        space: VectorSpace | None = None,
        rounding: float = 0.0,
    ) -> None:
        self.space = space = space_of(b, space, 0)
        self._rounding = rounding
        self.unit = exponents(b, space)
        self.matmul, self.apply = ScaledMap(matmul, space, measured=noise > 0), ScaledMap(preconditioner or same, space)
        self.noise = noise
        self.b = scaled(b, -self.unit)
        self.residual = space.norms(self.b)
        self.tolerance = scaled(torch.full_like(self.residual, atol), -self.unit) + rtol * self.residual
        self.best = torch.zeros_like(b)
        if x0 is not None and bool(space.anywhere(x0 != 0).any()):
            # Zero is the solution for zero.
            start = scaled(torch.where(space.anywhere(b != 0), x0, 0.0), -self.unit)
            product = self.matmul(start)
            exponent = torch.full_like(self.unit, self.matmul.exponent or 0)
            self.best = scaled(start, exponent)
            self.residual = space.norms(self.b - scaled(product, exponent))
        self.iterations = torch.zeros(b.shape[1], dtype=torch.int64, device=b.device)
        self.reasons: list[str | None] = [None] * b.shape[1]
        self.refuted = torch.zeros_like(self.iterations)
        self.active = torch.arange(b.shape[1], device=b.device)
        self._history = [self.residual.clone()]
        self._best_is_own = True
        """Whether nobody else holds the memory of ``best``, so that it may be written into."""
        self._units: tuple[list[int], Tensor] = ([], self.unit)

    def mark(self, step: int, **tensors: Tensor) -> Mark:
        """The state before an iteration, with the tensors of the method."""
        # Copies of what is written into in place; ``best`` is copied by whoever writes into it next.
        self._best_is_own = False
        own = {name: getattr(self, name) if name == "best" else getattr(self, name).clone() for name in _COUNTED}
        of_maps = [_UNKNOWN if unit.exponent is None else unit.exponent for unit in (self.matmul, self.apply)]
        if of_maps != self._units[0]:
            self._units = of_maps, torch.cat([self.unit, self.unit.new_tensor(of_maps)])
        own["units"] = self._units[1]
        own["size"] = torch.tensor([self.matmul.size], dtype=torch.float64, device="cpu")
        numbers = {"step": step, "reasons": list(self.reasons)}
        return Mark({**own, **tensors}, numbers, self._history, len(self._history))

    def resume(self, mark: Mark) -> int:
        """Go back to a state; the iteration that comes next."""
        for name in _COUNTED:
            setattr(self, name, mark.tensors[name].to(self.b.device).clone())
        for unit, exponent in zip((self.matmul, self.apply), mark.tensors["units"][-2:].tolist(), strict=True):
            unit.exponent = None if exponent == _UNKNOWN else int(exponent)
        self._best_is_own = True
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
        began = bool(self.space.anywhere(x != 0).any())
        r = self.b[:, self.active] - self.matmul(x) if began else self.b[:, self.active]
        return kept, x, r

    def meets(self, x: Tensor, norms: Tensor, columns: Tensor, factor: Tensor | float = 1.0) -> Tensor:
        """The mask of residual norms of iterates x that meet the tolerance, times a factor, or are rounding of products."""
        tolerance = factor * self.tolerance[columns]
        if self.noise:
            tolerance = tolerance + self.noise * self.matmul.size * self.space.norms(x)
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

    def better(self, norms: Tensor) -> Tensor:
        """The mask of active columns whose residual norms are the smallest so far."""
        better: Tensor = norms < self.residual[self.active]
        return better

    def observe(self, x: Tensor, norms: Tensor, better: Sequence[bool]) -> None:
        """Remember the iterates x of the active columns that are better than those before; x is not written into any more."""
        if all(better) and len(better) == len(self.reasons):
            self.best, self.residual, self._best_is_own = x, norms, False
        elif any(better):
            at = torch.tensor([i for i, yes in enumerate(better) if yes], device="cpu")
            at = at.to(x.device, non_blocking=True)  # from memory that is not pinned: it is read at once
            self._remember(self.active[at], x[:, at], norms[at])

    def _remember(self, columns: Tensor, x: Tensor, norms: Tensor) -> None:
        if not self._best_is_own:
            self.best, self.residual, self._best_is_own = self.best.clone(), self.residual.clone(), True
        self.best[:, columns] = x
        self.residual[columns] = norms

    def confirm(self, x: Tensor, claims: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Check claims of convergence with the true residual.

        Args:
            x: iterates of the active columns.
            claims: which of them claim convergence, boolean.

        Returns:
            (converged, stagnated, true residuals of the claims), the first two boolean over the active columns.
        """
        true = self.b[:, self.active[claims]] - self.matmul(x[:, claims])
        norms = self.space.norms(true)
        columns = self.active[claims]
        good = self.meets(x[:, claims], norms, columns)
        # What is known of another iterate may be an estimate that was too small: a confirmed one is kept in any case.
        better = good | (norms < self.residual[columns])
        self._remember(columns[better], x[:, claims][:, better], norms[better])
        self.refuted[columns] += (~good).long()
        converged, stagnated = torch.zeros_like(claims), torch.zeros_like(claims)
        converged[claims] = good
        stagnated[claims] = ~good & (self.refuted[columns] >= self.MOST_CONFIRMATIONS)
        return converged, stagnated, true

    def audit(self, x: Tensor, estimates: Tensor) -> Tensor:
        """Compare estimated with true residual norms; which active columns' recurrences have lost the residual.

        The best iterates are remembered on the way.
        """
        norms = self.space.norms(self.b[:, self.active] - self.matmul(x))
        before = self.residual[self.active]
        self.observe(x, norms, self.better(norms).tolist())
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
        norms = self.space.norms(self.b - self.matmul(self.best))
        x = scaled(self.best, self.unit - (self.matmul.exponent or 0))
        reasons = tuple(reason or rest for reason in self.reasons)
        # A residual that grew by rounding between two evaluations is still a solve; one that was never met is not.
        claimed = torch.tensor([reason == CONVERGED for reason in reasons], device=norms.device)
        finite = torch.isfinite(norms) & torch.isfinite(self.space.peaks(x))
        every = torch.arange(len(norms), device=norms.device)
        converged = finite & self.meets(self.best, norms, every, 1.0 + claimed)
        reasons = tuple(
            CONVERGED if ok else OVERFLOW if not sound else STAGNATED if reason == CONVERGED else reason
            for ok, sound, reason in zip(converged.tolist(), finite.tolist(), reasons, strict=True)
        )
        excused = self._excused(norms, reasons)
        reasons = tuple(ROUNDING if ok else reason for ok, reason in zip(excused.tolist(), reasons, strict=True))
        converged |= excused
        residual, history = scaled(norms, self.unit), scaled(torch.stack(self._history), self.unit)
        return SolveResult(x, converged, self.iterations, residual, reasons, history, rest == INTERRUPTED)

    def _excused(self, norms: Tensor, reasons: Sequence[str]) -> Tensor:
        """The mask of columns that got no further, at residual norms that products in this precision leave of any x."""
        stagnated = torch.tensor([reason in (STAGNATED, RUNAWAY) for reason in reasons], device=norms.device)
        if not self._rounding or not bool(stagnated.any()):
            return torch.zeros_like(stagnated)
        space, size, v = self.space, torch.zeros_like(norms), self.b
        for _ in range(POWERS):
            v = self.matmul(v / space.norms(v).clamp_min(torch.finfo(v.dtype).tiny))
            size = torch.maximum(size, space.norms(v))
        whole = size.amax() * space.norms(self.best) + space.norms(self.b)
        excused: Tensor = stagnated & (norms <= UNITS * self._rounding * whole) & (norms <= LARGE * space.norms(self.b))
        return excused


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

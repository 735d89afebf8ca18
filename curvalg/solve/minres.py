"""MINRES for symmetric matrices, definite or not, many columns at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from curvalg.solve.open_columns import RUNAWAY, STAGNATED, OpenColumns, ScaledMap, ended, same
from curvalg.solve.solve_result import Matmul, SolveResult
from curvalg.solve.trail import Trail
from curvalg.tensors.spaces import VectorSpace

AUDIT = 25
"""Iterations between two looks at the true residual."""
NOT_DEFINITE = "the preconditioner is not positive definite"


class _Recurrence:
    """The three-term recurrences of one restart; every array has one entry or column per active right-hand side."""

    def __init__(self, r: Tensor, apply: Matmul, space: VectorSpace) -> None:
        self.v_old, self.v = torch.zeros_like(r), r
        self.z = apply(r)
        self.gamma = space.dots(self.z, r).clamp_min(0).sqrt()
        self.gamma_old = torch.ones_like(self.gamma)
        self.eta = self.gamma.clone()
        self.w_old, self.w = torch.zeros_like(r), torch.zeros_like(r)
        self.c_old = self.c = torch.ones_like(self.gamma)
        self.s_old = self.s = torch.zeros_like(self.gamma)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device) -> _Recurrence:
        """Make the recurrences from the tensors of a mark."""
        state = _nothing()
        for name in vars(state):
            setattr(state, name, tensors[name].to(device))
        return state

    def arrange(self) -> None:
        """Arrange the memory as that of tensors from a file: sums along columns depend on that in their last bits."""
        for name, value in vars(self).items():
            setattr(self, name, value.contiguous())

    def select(self, kept: Tensor) -> None:
        """Keep some of the columns."""
        for name, value in vars(self).items():
            setattr(self, name, value[..., kept])

    def step(self, matmul: ScaledMap, apply: Matmul, space: VectorSpace) -> Tensor:
        """Make one Lanczos step and one Givens rotation, and update x. ``eta`` becomes the residual's estimate."""
        z = self.z / self.gamma
        az, delta = matmul.along(z)
        v_new = az - (delta / self.gamma) * self.v - (self.gamma / self.gamma_old) * self.v_old
        z_new = apply(v_new)
        gamma_new = space.dots(z_new, v_new).clamp_min(0).sqrt()
        a0 = self.c * delta - self.c_old * self.s * self.gamma
        a1 = (a0.square() + gamma_new.square()).sqrt().clamp_min(torch.finfo(a0.dtype).tiny)
        a2 = self.s * delta + self.c_old * self.c * self.gamma
        a3 = self.s_old * self.gamma
        w_new = (z - a3 * self.w_old - a2 * self.w) / a1
        self.c_old, self.c = self.c, a0 / a1
        self.s_old, self.s = self.s, gamma_new / a1
        update = self.c * self.eta * w_new
        self.eta = -self.s * self.eta
        self.w_old, self.w = self.w, w_new
        self.v_old, self.v, self.z = self.v, v_new, z_new
        self.gamma_old, self.gamma = self.gamma, gamma_new
        return update


def _nothing() -> _Recurrence:
    """The recurrences of no right-hand side."""
    return _Recurrence(torch.zeros(0, 0, device="cpu"), same, VectorSpace(0))


MARKED = ("x", "target", *vars(_nothing()))
"""Tensors of a mark, besides those of the book-keeping."""
VECTORS = ("x", "v_old", "v", "z", "w_old", "w")
"""Those that are columns of numbers."""


def minres(
    matmul: Matmul,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    preconditioner: Matmul | None = None,
    rtol: float,
    atol: float = 0.0,
    maxiter: int,
    trail: Trail | None = None,
    noise: float = 0.0,
    space: VectorSpace | None = None,
    rounding: float = 0.0,
) -> SolveResult:
    """Solve A X = B for symmetric A by minimal residuals (Paige and Saunders, SIAM J. Numer. Anal. 1975).

    Args:
        matmul: X -> A X.
        b: right-hand sides (n, K).
        x0: starting point (n, K).
        preconditioner: R -> P⁻¹ R, symmetric positive definite.
        rtol: relative tolerance, ‖b − A x‖ ≤ atol + rtol ‖b‖.
        atol: absolute tolerance.
        maxiter: the most iterations.
        trail, noise, space, rounding: as of :func:`curvalg.solve.cg`.

    >>> import torch
    >>> A = torch.diag(torch.tensor([1.0, -2.0, 4.0]))
    >>> minres(lambda x: A @ x, torch.ones(3, 1), rtol=1e-6, maxiter=10).x[:, 0]
    tensor([ 1.0000, -0.5000,  0.2500])
    """
    columns = OpenColumns(matmul, b, x0, rtol, atol, preconditioner, noise, space, rounding)
    return ended(columns, trail, lambda: _iterate(columns, preconditioner, maxiter, trail), maxiter)


def _iterate(columns: OpenColumns, preconditioner: Matmul | None, maxiter: int, trail: Trail | None) -> None:
    apply, space = columns.apply, columns.space
    if trail is not None and trail.start is not None:
        first, (x, target) = columns.resume(trail.start), columns.own(trail.start, "x", "target")
        state = _Recurrence.of(trail.start.tensors, x.device)
    else:
        first, (_, x, r) = 0, columns.start()
        state = _Recurrence(r, apply, space)
        target = state.eta * columns.tolerance[columns.active] / space.norms(r)
    sound = False
    """Whether γ is known to be positive in every column."""
    for iteration in range(first, maxiter + 1):
        if trail is not None:
            x = x.contiguous()
            state.arrange()
            trail.mark(columns.mark(iteration, x=x, target=target, **vars(state)))
        if not len(columns.active) or iteration == maxiter:
            break
        exhausted = ~(state.gamma > 0)
        if not sound and bool(exhausted.any()):  # the Krylov space is complete: nothing more can be gained
            reason = STAGNATED if preconditioner is None else NOT_DEFINITE
            kept = columns.freeze(exhausted, reason)
            x, target = x[:, kept], target[kept]
            state.select(kept)
            continue
        columns.count()
        x = x + state.step(columns.matmul, apply, space)
        columns.record(state.eta.abs() * columns.tolerance[columns.active] / target)
        if (iteration + 1) % AUDIT == 0:
            # In exact arithmetic eta is the residual; on (nearly) singular matrices it goes on falling while x blows up.
            lost = columns.audit(x, state.eta.abs() * columns.tolerance[columns.active] / target)
            if bool(lost.any()):
                kept = columns.freeze(lost, RUNAWAY)
                x, target = x[:, kept], target[kept]
                state.select(kept)
                continue
        claims = (state.eta.abs() <= target) | ~(state.gamma > 0)
        sound = not bool(claims.any())
        if sound:
            continue
        converged, stagnated, true = columns.confirm(x, claims)
        r = torch.zeros_like(x)
        r[:, claims] = true
        restart = (claims & ~converged & ~stagnated).clone()
        kept = columns.settle(converged, stagnated)
        x, r, target, restart = x[:, kept], r[:, kept], target[kept], restart[kept]
        state.select(kept)
        if bool(restart.any()):
            target = _restarted(state, r, restart, target, columns, apply)
    # What is left did not meet the tolerance, but its last iterates are the best.
    if len(columns.active):
        columns.confirm(x, torch.ones_like(columns.active, dtype=torch.bool))


def _restarted(
    state: _Recurrence, r: Tensor, restart: Tensor, target: Tensor, columns: OpenColumns, apply: Matmul
) -> Tensor:
    """Start the recurrences of refuted columns anew from their true residuals; the new targets."""
    fresh = _Recurrence(r[:, restart], apply, columns.space)
    for name, value in vars(fresh).items():
        whole = getattr(state, name).clone()
        whole[..., restart] = value
        setattr(state, name, whole)
    target = target.clone()
    target[restart] = fresh.eta * columns.tolerance[columns.active[restart]] / columns.space.norms(r[:, restart])
    return target

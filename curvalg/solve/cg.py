"""Conjugate gradients for positive definite matrices, many columns at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from curvalg.solve.open_columns import OpenColumns, ended
from curvalg.solve.solve_result import Matmul, SolveResult
from curvalg.solve.trail import Trail
from curvalg.tensors.spaces import VectorSpace

NON_POSITIVE = "non-positive curvature: the matrix is not positive definite"
PRECONDITIONER = "the preconditioner is not positive definite, or not finite"

MARKED = ("x", "r", "p", "rz")
"""Tensors of a mark, besides those of the book-keeping."""
VECTORS = ("x", "r", "p")
"""Those that are columns of numbers."""


def cg(
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
    """Solve A X = B for symmetric positive definite A (Hestenes and Stiefel, 1952).

    Each column ends by itself: converged, confirmed by a recomputed residual; at a direction p with pᵀAp ≤ 0, which
    proves that A is not positive definite; or at ``maxiter``.

    Args:
        matmul: X -> A X.
        b: right-hand sides (n, K).
        x0: starting point (n, K).
        preconditioner: R -> P⁻¹ R, symmetric positive definite.
        rtol: relative tolerance, ‖b − A x‖ ≤ atol + rtol ‖b‖.
        atol: absolute tolerance.
        maxiter: the most iterations.
        trail: where to start from, and where to leave marks; with one, an interruption ends the solve at the last of them.
        noise: relative error of products; what it leaves, ‖b − A x‖ ≤ noise ‖A‖ ‖x‖, counts as converged, too.
        space: that the columns are in; by default they are whole.
        rounding: ε of products; where the true residual no longer falls, what they leave of any x, some ε (‖A‖ ‖x‖ + ‖b‖),
            counts as converged, and the reason says so. 0: it does not.

    >>> import torch
    >>> A = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
    >>> cg(lambda x: A @ x, torch.ones(3, 1), rtol=1e-6, maxiter=10).x[:, 0]
    tensor([1.0000, 0.5000, 0.2500])
    """
    columns = OpenColumns(matmul, b, x0, rtol, atol, preconditioner, noise, space, rounding)
    return ended(columns, trail, lambda: _iterate(columns, maxiter, trail), maxiter)


def _iterate(columns: OpenColumns, maxiter: int, trail: Trail | None) -> None:
    space = columns.space
    if trail is not None and trail.start is not None:
        first, (x, r, p, rz) = columns.resume(trail.start), columns.own(trail.start, "x", "r", "p", "rz")
    else:
        first, (_, x, r) = 0, columns.start()
        z = columns.apply(r)
        p, rz = z.clone(), space.dots(r, z)
    for iteration in range(first, maxiter + 1):
        if trail is not None:
            # As they come from a file: sums along columns depend in their last bits on how these lie in memory.
            x, r, p = (t.contiguous() for t in (x, r, p))
            trail.mark(columns.mark(iteration, x=x, r=r, p=p, rz=rz))
        if not len(columns.active) or iteration == maxiter:
            return
        columns.count()
        q, curvature = columns.matmul.along(p)
        step = rz / curvature
        x = x + step * p
        r = r - step * q
        norms = space.norms(r)
        claims = norms <= columns.tolerance[columns.active]
        # All that is asked of a device in an iteration, by one wait; NaN is no positive curvature, either.
        asked = torch.stack([(curvature > 0) & (rz > 0), rz > 0, claims, columns.better(norms)])
        sound, definite, claimed, better = asked.tolist()
        if not all(sound):
            # The step of a column does not enter the others.
            reason = NON_POSITIVE if all(d for d, s in zip(definite, sound, strict=True) if not s) else PRECONDITIONER
            kept = columns.freeze(~asked[0], reason)
            x, r, p, rz, norms, claims = (t[..., kept] for t in (x, r, p, rz, norms, claims))
            claimed, better = claims.tolist(), [b for b, s in zip(better, sound, strict=True) if s]
            if not len(kept):
                continue
        columns.record(norms)
        columns.observe(x, norms, better)
        restart = None
        if any(claimed):
            converged, stagnated, true = columns.confirm(x, claims)
            r = r.clone()
            r[:, claims] = true
            restart = claims & ~converged & ~stagnated
            kept = columns.settle(converged, stagnated)
            x, r, p, rz, restart = (t[..., kept] for t in (x, r, p, rz, restart))
            if not len(columns.active):
                continue
        z = columns.apply(r)
        new = space.dots(r, z)
        ratio = new / rz
        if restart is not None:
            # After a refuted claim the recurrence has lost the residual: such columns start anew from the true one.
            ratio = torch.where(restart, torch.zeros_like(new), ratio)
        p, rz = z + ratio * p, new

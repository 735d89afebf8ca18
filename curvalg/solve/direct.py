"""Dense factorisations: of a matrix for many right-hand sides, and of symmetric ones by their eigenvectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvalg.errors import FactsError
from curvalg.tensors.memory import widest
from curvalg.tensors.random_numbers import normals

NOISE = 32
"""Units of rounding that eigenvalues of a sum of many outer products may be wrong by, relative to the largest."""
PROBES = 4
"""Directions that a smallest singular value is searched from: all four are nearly orthogonal to its vector once in 1e6."""
STEPS = 3
"""Steps of the search: one finds the value of a singular matrix, the others those that are near."""

Solve = Callable[[Tensor], Tensor]
"""B (n, K) -> A⁻¹ B (n, K)."""


def factorize(matrix: Tensor, *, positive_definite: bool | None, rounding: float = 0.0) -> Solve:
    """Factorise a dense matrix for solves.

    By Cholesky where positive definiteness is proved, else by LU with partial pivoting. A matrix without an inverse seldom has
    a pivot of zero: rounding leaves it a smallest singular value of about ε ‖A‖, and solves that are as large as rounding
    errors are small. So that value is estimated, by inverse iteration from a few directions.

    Args:
        matrix: (n, n).
        positive_definite: the fact; a Cholesky factorisation that fails although it is True falls back to LU.
        rounding: error of the entries, relative to ‖A‖, where it is more than the n ε of the arithmetic here.

    Raises:
        FactsError: the matrix is singular to working precision.
    """
    n = len(matrix)
    if not n:
        return lambda b: b
    solve = _factorized(matrix, positive_definite)
    noise = max(rounding, n * torch.finfo(matrix.dtype).eps)
    if solve is None or not condition(matrix, solve) * noise < 1.0:
        raise FactsError(
            f"the {n} x {n} matrix is singular to working precision ({matrix.dtype}, entries with relative errors of "
            f"{noise:.1e}), so it has no inverse; add damping, c * Identity"
        )
    return solve


def _factorized(matrix: Tensor, positive_definite: bool | None) -> Solve | None:
    """Solves by a factorisation; None where a pivot is zero."""
    if positive_definite:
        factor, info = torch.linalg.cholesky_ex(matrix)
        if not int(info):
            return lambda b: torch.cholesky_solve(b, factor)
    lu, pivots, info = torch.linalg.lu_factor_ex(matrix)
    return None if int(info) else lambda b: torch.linalg.lu_solve(lu, pivots, b)


def condition(matrix: Tensor, solve: Solve) -> float:
    """A lower bound of ‖A‖ ‖A⁻¹‖ that is close, for A (n, n) and its solves."""
    start = normals((len(matrix), PROBES), 0).to(matrix)
    return float(_gain(solve, start) * _gain(lambda x: matrix @ x, start))


def _gain(apply: Solve, start: Tensor) -> Tensor:
    """The largest factor by which a map was seen to lengthen a vector: a lower bound of its norm, from power iteration."""
    x, found = start / start.abs().amax(0), start.new_zeros(())
    for _ in range(STEPS):
        x = apply(x)
        length = x.abs().amax(0)  # of numbers whose squares would overflow, too
        found = torch.maximum(found, length.max())
        x = x / length.clamp_min(torch.finfo(x.dtype).tiny)
    return found


def eigenpairs(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and orthonormal eigenvectors of symmetric matrices (..., n, n), always found in float64.

    In float32 the vectors of eigenvalues that nearly coincide come out less orthogonal, and small eigenvalues beside large ones
    are rounding. A device without float64 leaves the work to the CPU. Both come back in the dtype and on the device of the
    matrices.
    """
    able = widest(matrices.device) == torch.float64
    values, vectors = torch.linalg.eigh((matrices if able else matrices.cpu()).double())
    return values.to(matrices), vectors.to(matrices)

"""Dense factorisations: of a matrix for many right-hand sides, and of symmetric ones by their eigenvectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvalg.errors import FactsError
from curvalg.tensors.memory import widest

Solve = Callable[[Tensor], Tensor]
"""B (n, K) -> A⁻¹ B (n, K)."""


def factorize(matrix: Tensor, *, positive_definite: bool | None) -> Solve:
    """Factorise a dense matrix for solves.

    By Cholesky where positive definiteness is proved, else by LU with partial pivoting.

    Args:
        matrix: (n, n).
        positive_definite: the fact; a Cholesky factorisation that fails although it is True falls back to LU.

    Raises:
        FactsError: the matrix is singular to working precision.
    """
    if positive_definite:
        factor, info = torch.linalg.cholesky_ex(matrix)
        if not int(info):
            return lambda b: torch.cholesky_solve(b, factor)
    lu, pivots, info = torch.linalg.lu_factor_ex(matrix)
    diagonal = lu.diagonal().abs()
    if int(info) or float(diagonal.min()) <= torch.finfo(matrix.dtype).eps * float(diagonal.max()):
        raise FactsError(
            f"the {matrix.shape[0]} x {matrix.shape[1]} matrix is singular to working precision ({matrix.dtype}), so it has "
            "no inverse; add damping, c * Identity"
        )
    return lambda b: torch.linalg.lu_solve(lu, pivots, b)


def eigenpairs(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and orthonormal eigenvectors of symmetric matrices (..., n, n), always found in float64.

    In float32 the vectors of eigenvalues that nearly coincide come out less orthogonal, and small eigenvalues beside large ones
    are rounding. A device without float64 leaves the work to the CPU. Both come back in the dtype and on the device of the
    matrices.
    """
    able = widest(matrices.device) == torch.float64
    values, vectors = torch.linalg.eigh((matrices if able else matrices.cpu()).double())
    return values.to(matrices), vectors.to(matrices)

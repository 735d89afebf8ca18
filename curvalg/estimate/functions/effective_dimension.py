"""The effective dimension of a positive semidefinite operator."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from curvalg.distributed.group import shared_call
from curvalg.estimate.functions.spectral_sum import (
    refuse_negative,
    spectral_sum,
)
from curvalg.estimate.proofs import require_definite
from curvalg.estimate.request import OnFail, Request, require_count, require_positive
from curvalg.estimate.result import Estimate, exactly
from curvalg.estimate.target import CHEAP, Basis, target
from curvalg.lowering.matrices import Eigh
from curvalg.runs.run_file import FileName
from curvalg.tensors.memory import small


@shared_call
def effective_dimension(
    op: Any,
    damping: float,
    *,
    products: int = 500,
    tol: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    on_fail: OnFail = "raise",
    basis: Basis = "device",
    checkpoint: FileName | None = None,
    progress: bool = False,
) -> Estimate:
    """The number of directions of a positive semidefinite operator that stand out from the damping.

    tr A (A + λ)⁻¹ ≈ (n / k) Σ_probes Σ_j τ_j² θ_j / (θ_j + λ), with the quadrature of :func:`logdet`. Where the structure of a
    curvature operator gives all eigenvalues at no greater cost, it is exact.

    Args:
        op: a :class:`~curvalg.CurvatureOperator` that is proved positive semidefinite, another SciPy ``LinearOperator`` or a
            matrix, of which the Ritz values must not be negative.
        damping: λ > 0.
        products, tol, steps, seed, on_fail, basis, checkpoint, progress: as of :func:`logdet`.

    Returns:
        A value between 0 and n, with its error.

    Raises:
        FactsError: not positive semidefinite, or not proved to be.
        ExpressionError: an argument that makes no sense.
        ConvergenceError: the tolerance was not reached; the estimate is in ``error.result``.

    Source: Ubaru, Chen and Saad (SIAM J. Matrix Anal. Appl. 2017).

    >>> import torch
    >>> estimate = effective_dimension(torch.eye(10), damping=1.0)
    >>> round(estimate.value, 6)
    5.0
    """
    begin, given = time.perf_counter(), target(op, basis)
    shift = require_positive(damping, "a damping > 0", "; without any, it is the rank")
    request = Request(seed, checkpoint, progress, on_fail, tol, products=products)
    steps = None if steps is None else require_count(steps, "steps")
    require_definite(given, "effective_dimension", strictly=False)
    eps = torch.finfo(given.space.dtype).eps

    def share(values: Tensor) -> Tensor:
        values = refuse_negative(values, "effective_dimension", given.name, strictly=False, eps=eps)
        return values / (values + shift)

    if (known := given.structured("eigh", max(CHEAP, products))) is not None:
        pairs: Eigh = known[0]
        values, rest = small(pairs.eigenvalues).clamp_min(0.0), max(pairs.rest, 0.0)
        return exactly(float((values / (values + shift)).sum()) + pairs.multiplicity * rest / (rest + shift), 0, begin)
    return spectral_sum(given, share, request, steps, "effective_dimension", begin)

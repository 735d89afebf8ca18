"""The log-determinant of a positive definite operator."""

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
from curvalg.estimate.request import OnFail, Request, require_count
from curvalg.estimate.result import Estimate, exactly
from curvalg.estimate.target import CHEAP, Basis, target
from curvalg.runs.run_file import FileName


@shared_call
def logdet(
    op: Any,
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
    """The log-determinant log det A of a positive definite operator, by stochastic Lanczos quadrature.

    log det A = tr log A ≈ (n / k) Σ_probes Σ_j τ_j² ln θ_j, with the Ritz values θ and squared first components τ² of k Lanczos
    recurrences. Where the structure of a curvature operator gives it at no greater cost, it is exact.

    Args:
        op: a :class:`~curvalg.CurvatureOperator` that is proved positive definite, another SciPy ``LinearOperator`` or a
            matrix, of which the Ritz values must be positive.
        products: with one vector, probes · steps.
        tol: double the probes until the error is at most tol · \\|value\\|.
        steps: of each probe; by default √(5 products). More for spectra that reach down to zero.
        seed: of the probes.
        on_fail: "raise", or "warn" and return what there is with ``converged=False``.
        basis: where the Krylov vectors lie: on the "device" of the operator or, where they do not fit there, in the memory of
            the "cpu", which they leave for products only.
        checkpoint: a file that the run is written to now and then and resumed from, if it is there.
        progress: show products done and expected.

    Returns:
        The value; its error is one standard error over the probes (wider for few, by Student's t) plus the difference to
            rules of half the steps.

    Raises:
        FactsError: not positive definite, or not proved to be.
        ExpressionError: an argument that makes no sense.
        ProblemError: a product that is not finite.
        CheckpointError: the file is of another run, or damaged.
        ConvergenceError: the tolerance was not reached; the estimate is in ``error.result``.

    Source: Ubaru, Chen and Saad (SIAM J. Matrix Anal. Appl. 2017).

    >>> import torch
    >>> estimate = logdet(torch.diag(torch.linspace(1, 2, 100)))
    >>> abs(estimate.value - float(torch.linspace(1, 2, 100).log().sum())) < 4 * estimate.error
    True
    """
    begin, given = time.perf_counter(), target(op, basis)
    request = Request(seed, checkpoint, progress, on_fail, tol, products=products)
    steps = None if steps is None else require_count(steps, "steps")
    require_definite(given, "logdet", strictly=True)
    if (known := given.structured("logdet", max(CHEAP, products))) is not None:
        return exactly(float(known[0]), 0, begin)
    eps = torch.finfo(given.space.dtype).eps

    def logarithm(values: Tensor) -> Tensor:
        return refuse_negative(values, "logdet", given.name, strictly=True, eps=eps).log()

    return spectral_sum(given, logarithm, request, steps, "logdet", begin)

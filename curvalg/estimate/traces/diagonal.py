"""The diagonal of an operator."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from curvalg.distributed.group import shared_call
from curvalg.estimate.proofs import require_square
from curvalg.estimate.request import OnFail, Request, require_one_of
from curvalg.estimate.result import Estimate, exactly
from curvalg.estimate.sampling.estimator import Estimator, UnitVectors
from curvalg.estimate.sampling.integrands import DIAGONAL
from curvalg.estimate.sampling.sampled import sampled
from curvalg.estimate.target import target
from curvalg.estimate.traces.hutchinson import RunningMean
from curvalg.estimate.traces.xdiag import XDiag
from curvalg.runs.run_file import FileName

METHODS: Mapping[str, type[Estimator]] = {kind.method: kind for kind in (UnitVectors, RunningMean, XDiag)}


@shared_call
def diagonal(
    op: Any,
    *,
    products: int = 60,
    tol: float | None = None,
    method: str = "auto",
    seed: int = 0,
    maxiter: int | None = None,
    on_fail: OnFail = "raise",
    checkpoint: FileName | None = None,
    progress: bool = False,
) -> Estimate:
    """The diagonal of a square operator, Aᵢᵢ, with the standard error of each entry.

    Exact under the same conditions as :func:`~curvalg.estimate.trace`. Else by random signs ω, with these methods:

    - "xdiag": diag QQᵀA of a basis Q of the range of A plus a sample of the rest, averaged over all ways to leave one test
      vector out. Needs products with Aᵀ where A is not symmetric. The choice of "auto".
    - "hutchinson": the mean of ω ⊙ Aω, whose variance in entry i is Σ_{j≠i} Aᵢⱼ² for one sample. Takes no memory.
    - "exact": by structure or by unit vectors.

    Args:
        op: a :class:`~curvalg.CurvatureOperator`, another SciPy ``LinearOperator`` or a matrix, (n, n).
        tol: ‖error‖ allowed, relative to ‖value‖.
        products, method, seed, maxiter, on_fail, checkpoint, progress: as of :func:`~curvalg.estimate.trace`.

    Returns:
        Estimate: value and one standard error, (n,), float64 on the operator's device.

    Raises:
        FactsError: the operator is not square, or "xdiag" needs a transpose that it does not have.
        ExpressionError: an argument that makes no sense.
        ProblemError: a product that is not finite.
        CheckpointError: the file is of another run, or damaged.
        ConvergenceError: the tolerance was not reached; the estimate as it is then is in ``error.result``.

    Epperly, Tropp and Webber, SIAM J. Matrix Anal. Appl. 2024, section on diagonals.

    >>> import torch
    >>> diagonal(torch.tensor([[2.0, 1.0], [1.0, 3.0]])).value
    tensor([2., 3.], dtype=torch.float64)
    """
    request = Request(seed, checkpoint, progress, on_fail, tol, products=products, maxiter=maxiter)
    require_one_of(method, "method", ("auto", *METHODS))
    begin, given = time.perf_counter(), target(op)
    require_square(given, "diagonal")
    if method in ("auto", "exact") and (known := given.structured("diagonal", products)) is not None:
        return exactly(*known, begin)
    best = UnitVectors if given.size <= products else XDiag
    return sampled(best if method == "auto" else METHODS[method], DIAGONAL, given, request, "diagonal")

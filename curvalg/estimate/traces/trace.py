"""The trace of a square operator."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from curvalg.distributed.group import shared_call
from curvalg.estimate.proofs import require_psd, require_square
from curvalg.estimate.request import OnFail, Request, require_one_of
from curvalg.estimate.result import Estimate, exactly
from curvalg.estimate.sampling.estimator import Estimator, UnitVectors
from curvalg.estimate.sampling.integrands import TRACE
from curvalg.estimate.sampling.sampled import sampled
from curvalg.estimate.target import target
from curvalg.estimate.traces.hutchinson import SampleMean
from curvalg.estimate.traces.hutchpp import HutchPlusPlus
from curvalg.estimate.traces.xnystrace import XNysTrace
from curvalg.estimate.traces.xtrace import XTrace
from curvalg.runs.run_file import FileName

METHODS: Mapping[str, type[Estimator]] = {
    kind.method: kind for kind in (UnitVectors, SampleMean, HutchPlusPlus, XTrace, XNysTrace)
}


@shared_call
def trace(
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
    """The trace of a square operator, Σ Aᵢᵢ, with its standard error.

    Exact where the structure of a curvature operator gives it for no more than ``products`` products, and where there are no
    more rows than that. Else by random test vectors, uniform on the sphere of radius √n, with these methods:

    - "xnystrace": tr of a Nyström approximation plus a sample of the rest, averaged over all ways to leave one test vector
      out. For positive semi-definite operators; one round of products. The choice of "auto" where that is proved.
    - "xtrace": as "xnystrace", with a basis of the range of A. Any operator; two rounds. The choice of "auto" otherwise.
    - "hutch++": a basis and independent samples. Two rounds.
    - "hutchinson": independent samples only. Takes no memory, and no time beside its products. One round.
    - "exact": by structure or by unit vectors.

    For so many products "hutchinson" has twice as many samples as "xtrace": where eigenvalues fall off slowly it is the more
    precise one, and where a few of them make up most of ‖A‖² it is far behind. "auto" chooses it only where
    ``products`` are too few for two test vectors of the others, since the spectrum is not known beforehand: compare the errors
    of both for a few products.

    All are unbiased, except for the Nyström shift of the size of rounding. Memory: "xtrace" 1.5 ``products`` vectors,
    "hutch++" and "xnystrace" up to twice that.

    Args:
        op: a :class:`~curvalg.CurvatureOperator`, another SciPy ``LinearOperator`` or a matrix, (n, n).
        products: the most products (of one vector); with a tolerance, those of the first attempt.
        tol: the standard error allowed, relative to |value|. Products are doubled until it is reached, and all products are
            used again; where they would exceed n, an orthonormal basis is completed and the value is exact.
        method: as above.
        seed: of the test vectors, the same for every device and precision.
        maxiter: the most products that a tolerance may take; by default 16 ``products``, or more where up to 1000 make the
            value exact.
        on_fail: "raise", or "warn" and return what there is with ``converged=False``.
        checkpoint: a file that the run is written to now and then and resumed from, if it is there.
        progress: show products done and expected.

    Returns:
        Estimate: value and one standard error, floats; about 95 of 100 values lie within two of it, with few products too. Of
        "hutch++" and "xtrace" it comes from the squared norms of what is outside of the basis, with the covariances of xtrace's
        estimates, and is widened as Student's t is; of "xnystrace" it is that of the leave-one-out estimates times 1.6, so that
        about nine of ten values lie within two of it. It is never less than what rounding may do.
        After Ctrl-C it is the estimate by the last complete step, ``partial=True``.

    Raises:
        FactsError: the operator is not square, or "xnystrace" is asked for and it is not proved positive semi-definite.
        ExpressionError: an argument that makes no sense.
        ProblemError: a product that is not finite.
        CheckpointError: the file is of another run, or damaged.
        ConvergenceError: the tolerance was not reached; the estimate as it is then is in ``error.result``.

    Epperly, Tropp and Webber, XTrace: Making the most of every sample in stochastic trace estimation, SIAM J. Matrix Anal.
    Appl. 2024; Meyer, Musco, Musco and Woodruff, Hutch++: Optimal stochastic trace estimation, SOSA 2021.

    >>> import torch
    >>> from curvalg import Problem, registry
    >>> model, data = torch.nn.Linear(3, 1, bias=False), (torch.eye(3), torch.zeros(3, 1))
    >>> problem = Problem(model, torch.nn.MSELoss(reduction="sum"), data)
    >>> estimate = trace(registry.build("hessian").lower(problem))
    >>> estimate.value, estimate.error, estimate.method
    (6.0, 0.0, 'exact')
    """
    request = Request(seed, checkpoint, progress, on_fail, tol, products=products, maxiter=maxiter)
    require_one_of(method, "method", ("auto", *METHODS))
    begin, given = time.perf_counter(), target(op)
    require_square(given, "trace")
    if method in ("auto", "exact") and (known := given.structured("trace", products)) is not None:
        return exactly(*known, begin)
    if method == XNysTrace.method:
        require_psd(given, "use method='xtrace', or write an expression that is proved to be, such as ggn")
    best: type[Estimator] = UnitVectors if given.size <= products else XNysTrace if given.psd else XTrace
    if best is not UnitVectors and products < 2 * best.multiplications:  # too few for two test vectors of it
        best = SampleMean
    return sampled(best if method == "auto" else METHODS[method], TRACE, given, request, "trace")

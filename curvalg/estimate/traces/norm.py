"""Norms of an operator, which may be rectangular."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from curvalg.distributed.group import shared_call
from curvalg.errors import ConvergenceError, FactsError
from curvalg.estimate.proofs import require_psd
from curvalg.estimate.request import OnFail, Request, require_auto, require_one_of
from curvalg.estimate.result import Eigenpairs, Estimate, exactly
from curvalg.estimate.sampling.estimator import Estimator, UnitVectors
from curvalg.estimate.sampling.integrands import SQUARED_NORM, TRACE
from curvalg.estimate.sampling.sampled import sampled
from curvalg.estimate.spectra.eigen import eigsh
from curvalg.estimate.spectra.singular import SingularTriplets, gram, svds
from curvalg.estimate.target import Target, target
from curvalg.estimate.traces.hutchinson import SampleMean
from curvalg.estimate.traces.trace import trace
from curvalg.estimate.traces.xnystrace import XNysTrace
from curvalg.lowering.matrices import Eigh
from curvalg.runs.run_file import FileName
from curvalg.solve.powers import norms
from curvalg.tensors.memory import wide

PRODUCTS = 60
METHODS: Mapping[str, type[Estimator]] = {kind.method: kind for kind in (UnitVectors, SampleMean, XNysTrace)}


@shared_call
def norm(
    op: Any,
    ord: Literal["fro", "spectral", "nuclear", 2] = "fro",
    *,
    products: int | None = None,
    tol: float | None = None,
    method: str = "auto",
    seed: int = 0,
    maxiter: int | None = None,
    on_fail: OnFail = "raise",
    checkpoint: FileName | None = None,
    progress: bool = False,
) -> Estimate:
    """A norm of an operator, which may be rectangular, with its standard error.

    - "fro": ‖A‖_F = √tr AᵀA. Exact where structure gives the eigenvalues for no more than ``products`` products, or by unit
      vectors where there are no more columns. Else by "xnystrace" of AᵀA (Epperly, Tropp and Webber, 2024), each product of
      which is two here, or "hutchinson", the mean of ‖Aω‖², which is "auto" where the operator has no transpose.
    - "spectral", or 2: the largest singular value, by :func:`~curvalg.estimate.eigsh` or :func:`~curvalg.estimate.svds`.
    - "nuclear": the trace, of operators that are proved positive semi-definite; the sum of singular values of others is out of
      reach of products alone.

    Args:
        op: a :class:`~curvalg.CurvatureOperator`, another SciPy ``LinearOperator`` or a matrix, (m, n).
        ord: as above.
        products: the most products, by default 60; of the spectral norm, the same as ``maxiter``.
        tol: relative to the value; of the spectral norm, of eigenvalues of A or AᵀA, by default as of :func:`eigsh`.
        method: for "fro" as above; for "nuclear" as of :func:`~curvalg.estimate.trace`; for "spectral" "auto" only.
        seed, maxiter, on_fail, checkpoint, progress: as of :func:`~curvalg.estimate.trace`.

    Returns:
        Estimate: value and one standard error, floats; of the spectral norm, a bound by the residual.

    Raises:
        FactsError: the nuclear norm of an operator that is not proved positive semi-definite.
        ExpressionError: an argument that makes no sense.
        ProblemError: a product that is not finite.
        CheckpointError: the file is of another run, or damaged.
        ConvergenceError: the tolerance was not reached; the estimate as it is then is in ``error.result``.

    >>> import torch
    >>> norm(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])).value
    5.0
    """
    require_one_of(ord, "ord", ORDERS)
    given = target(op)
    # Checked for all norms; the spectral one takes as many as maxiter, and eigsh checks that.
    request = Request(
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
        on_fail=on_fail,
        tol=tol,
        products=PRODUCTS if products is None else products,
        maxiter=maxiter if products is not None or maxiter is None else max(maxiter, PRODUCTS),
    )
    return ORDERS[ord](given, request, method, maxiter if products is None or maxiter is not None else products)


def _frobenius(given: Target, request: Request, method: str, _: int | None) -> Estimate:
    require_one_of(method, "method", ("auto", *METHODS))
    exactable = method in ("auto", "exact")
    if exactable and (found := _by_eigenvalues(given, request.products)) is not None:
        return found
    # d √x / √x = d x / 2x
    squared = dataclasses.replace(request, tol=None if request.tol is None else min(2 * request.tol, 1 - 1e-9))
    if method == "auto" and given.size > request.products:
        by_gram = request.products >= 4 and _has_adjoint(given)
        method = XNysTrace.method if by_gram else SampleMean.method
    kind, integrand, multiplied, price = METHODS.get(method, UnitVectors), SQUARED_NORM, given, 1
    if kind is XNysTrace:
        integrand, multiplied, price = TRACE, dataclasses.replace(gram(given.in_units()), psd=True), 2
    return sampled(kind, integrand, multiplied, squared, "squared Frobenius norm", price=price, finish=_root)


def _root(squared: Estimate) -> Estimate:
    value, error = math.sqrt(max(0.0, float(squared.value))), float(squared.error)
    return dataclasses.replace(squared, value=value, error=error / (2 * value) if value else math.sqrt(error))


def _by_eigenvalues(given: Target, products: int) -> Estimate | None:
    begin = time.perf_counter()
    if not given.symmetric or (known := given.structured("eigh", products)) is None:
        return None
    spectrum: Eigh = known[0]
    listed = wide(spectrum.eigenvalues)
    rest = listed.new_tensor([math.sqrt(spectrum.multiplicity) * spectrum.rest])
    return exactly(float(norms(torch.cat([listed, rest])[:, None])), known[1], begin)


def _has_adjoint(given: Target) -> bool:
    if given.symmetric:
        return True
    space = given.space
    try:
        given.adjoint(torch.zeros(given.images.local, 1, dtype=space.dtype, device=space.device))
    except FactsError:
        return False
    return True


def _spectral(given: Target, request: Request, method: str, most: int | None) -> Estimate:
    require_auto(method, "the spectral norm")
    options: dict[str, Any] = {**_shared(request), "maxiter": most}
    try:
        return _largest(eigsh(given, 1, which="LM", **options) if given.symmetric else svds(given, 1, **options))
    except ConvergenceError as error:
        if isinstance(error.result, (Eigenpairs, SingularTriplets)):
            error.result = _largest(error.result)
        raise


def _largest(found: Eigenpairs | SingularTriplets) -> Estimate:
    values = found.eigenvalues if isinstance(found, Eigenpairs) else found.values
    return Estimate(**found.account, value=float(values[-1].abs()), error=float(found.residuals[-1]))


def _nuclear(given: Target, request: Request, method: str, _: int | None) -> Estimate:
    reason = (
        "the nuclear norm is the trace of such operators only; use ord='fro', or svds for the largest singular values"
    )
    require_psd(given if given.psd is not None else dataclasses.replace(given, psd=False), reason)
    return trace(given, method=method, products=request.products, maxiter=request.maxiter, **_shared(request))


def _shared(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in ("tol", "seed", "on_fail", "checkpoint", "progress")}


ORDERS: dict[str | int, Callable[[Target, Request, str, int | None], Estimate]] = {
    "fro": _frobenius,
    "spectral": _spectral,
    "nuclear": _nuclear,
    2: _spectral,
}

"""Norms of an operator."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, Literal

import torch

from curvalg.errors import ConvergenceError, FactsError, OptionError
from curvalg.estimate.estimating import Methods, OnFail, Request, require_psd, scaled
from curvalg.estimate.result import Eigenpairs, Estimate, exactly
from curvalg.estimate.sampling.sampler import Sketch, UnitVectors
from curvalg.estimate.spectra.eigen import eigsh
from curvalg.estimate.spectra.singular import SingularTriplets, gram, svds
from curvalg.estimate.target import Target, target
from curvalg.estimate.traces.hutchinson import SquaredNorms
from curvalg.estimate.traces.trace import trace
from curvalg.estimate.traces.xnystrace import XNysTrace
from curvalg.lowering.matrices import Eigh
from curvalg.runs.run_file import FileName
from curvalg.solve.powers import norms

PRODUCTS = 60
METHODS: Methods = {kind.method: kind for kind in (UnitVectors, SquaredNorms, XNysTrace)}


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
    if isinstance(ord, bool) or not (isinstance(ord, (str, int)) and ord in ORDERS):
        raise OptionError(f"expected ord to be one of {', '.join(map(repr, ORDERS))}, got {ord!r}")
    given = target(op)
    # Checked for all norms; the spectral one takes as many as maxiter, and eigsh checks that.
    request = Request(
        PRODUCTS if products is None else products,
        tol,
        method,
        seed,
        maxiter if products is not None or maxiter is None else max(maxiter, PRODUCTS),
        on_fail,
        checkpoint,
        progress,
    )
    return ORDERS[ord](given, request, maxiter if products is None or maxiter is not None else products)


def _frobenius(given: Target, request: Request, _: int | None) -> Estimate:
    request.known(METHODS)
    kind: type[Sketch]
    method, exactable = request.method, request.method in ("auto", "exact")
    if exactable and (found := _by_eigenvalues(given, request.products)) is not None:
        return found
    if exactable and (method == "exact" or given.size <= request.products):
        kind, multiplied, price = _Columns, given, 1
    elif method == XNysTrace.method or (method == "auto" and _has_adjoint(given) and request.products >= 4):
        kind, multiplied, price = XNysTrace, dataclasses.replace(gram(given.in_units()), psd=True), 2
    else:
        kind, multiplied, price = SquaredNorms, given, 1
    # d √x / √x = d x / 2x
    squared = dataclasses.replace(request, tol=None if request.tol is None else min(2 * request.tol, 1 - 1e-9))
    return squared.estimate(squared.algorithm(kind, multiplied, price), "squared Frobenius norm", _root)


class _Columns(UnitVectors):
    """Σ of the squared norms of all columns."""

    contribution = SquaredNorms.contribution


def _root(squared: Estimate) -> Estimate:
    value, error = math.sqrt(max(0.0, float(squared.value))), float(squared.error)
    return scaled(squared, value, error / (2 * value) if value else math.sqrt(error))


def _by_eigenvalues(given: Target, products: int) -> Estimate | None:
    begin = time.perf_counter()
    if not given.symmetric or (known := given.structured("eigh", products)) is None:
        return None
    spectrum: Eigh = known[0]
    listed = spectrum.eigenvalues.double()
    rest = listed.new_tensor([math.sqrt(spectrum.multiplicity) * spectrum.rest])
    return exactly(float(norms(torch.cat([listed, rest])[:, None])), known[1], begin)


def _has_adjoint(given: Target) -> bool:
    if given.symmetric:
        return True
    space = given.space
    try:
        given.adjoint(torch.zeros(given.shape[0], 1, dtype=space.dtype, device=space.device))
    except FactsError:
        return False
    return True


def _spectral(given: Target, request: Request, most: int | None) -> Estimate:
    if request.method != "auto":
        raise OptionError(f"expected method='auto' for the spectral norm, got {request.method!r}; leave it out")
    options: dict[str, Any] = {
        "tol": request.tol,
        "seed": request.seed,
        "maxiter": most,
        "on_fail": request.on_fail,
        "checkpoint": request.checkpoint,
        "progress": request.progress,
    }
    try:
        return _largest(eigsh(given, 1, which="LM", **options) if given.symmetric else svds(given, 1, **options))
    except ConvergenceError as error:
        if isinstance(error.result, (Eigenpairs, SingularTriplets)):
            error.result = _largest(error.result)
        raise


def _largest(found: Eigenpairs | SingularTriplets) -> Estimate:
    values = found.eigenvalues if isinstance(found, Eigenpairs) else found.values
    return Estimate(
        method=found.method,
        products=found.products,
        seconds=found.seconds,
        converged=found.converged,
        partial=found.partial,
        value=float(values[-1].abs()),
        error=float(found.residuals[-1]),
    )


def _nuclear(given: Target, request: Request, _: int | None) -> Estimate:
    reason = (
        "the nuclear norm is the trace of such operators only; use ord='fro', or svds for the largest singular values"
    )
    require_psd(given if given.psd is not None else dataclasses.replace(given, psd=False), reason)
    options = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    return trace(given, **options)


ORDERS: dict[str | int, Callable[[Target, Request, int | None], Estimate]] = {
    "fro": _frobenius,
    "spectral": _spectral,
    "nuclear": _nuclear,
    2: _spectral,
}

"""The trace in Takeuchi's information criterion, tr (H + λ)⁻¹ C."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import torch
from torch import Tensor

from curvalg.distributed.group import shared_call
from curvalg.errors import ExpressionError, FactsError
from curvalg.estimate.request import OnFail, require_positive
from curvalg.estimate.result import Estimate, exactly
from curvalg.estimate.target import Target, require_problem, target
from curvalg.estimate.traces.trace import trace
from curvalg.expr import Expr, Identity, inverse
from curvalg.expr.term import Term
from curvalg.expr.terms import Covariance, Hessian
from curvalg.lowering import CurvatureOperator
from curvalg.lowering.inverses.rounding import default_rtol, epsilon
from curvalg.lowering.low_rank.factored_sum import why_not_factored
from curvalg.lowering.low_rank.weighted_factor import WeightedFactor
from curvalg.lowering.vectors import Space
from curvalg.problem import Problem
from curvalg.runs.run_file import FileName
from curvalg.runs.run_state import Options
from curvalg.tensors.memory import wide

DENSE = 256
"""Parameters up to which both matrices are made."""
MOST = 4096
"""The largest number of parameters whose matrices are made where exactness is asked for."""


@shared_call
def tic(
    problem: Problem,
    *,
    hessian: Expr | None = None,
    covariance: Expr | None = None,
    damping: float = 0.0,
    products: int = 60,
    tol: float | None = None,
    method: str = "auto",
    seed: int = 0,
    maxiter: int | None = None,
    on_fail: OnFail = "raise",
    checkpoint: FileName | None = None,
    progress: bool = False,
) -> Estimate:
    """The trace in Takeuchi's information criterion, tr (H + λ I)⁻¹ C, the effective number of parameters of a fit.

    For a mean loss, H and C are means over samples, and the trace divided by N estimates the generalisation gap at a
    minimiser; for a sum loss both are sums, and the value is the same. It is D where the model is well specified. Of a
    covariance C = V Vᵀ with M columns it is the trace of Vᵀ(H + λ I)⁻¹ V (M × M), which needs no D × D matrix. Takeuchi 1976;
    Thomas et al., arXiv 1906.07774.

    Args:
        problem: with a loss.
        hessian: H; by default ``hessian``. ``ggn`` is positive semi-definite, so that conjugate gradients serve, or its Gram
            matrix.
        covariance: C; by default ``covariance``.
        damping: λ ≥ 0.
        products: right-hand sides to solve for; up to 256 parameters (4096 with method="exact") the matrices are made instead,
            the value is exact, and none of the following is needed.
        tol, method, seed, maxiter, on_fail, checkpoint, progress: as of :func:`curvalg.estimate.trace`.

    Returns:
        Estimate: value and one standard error, never less than the tolerance of the solves. ``products`` counts right-hand
            sides, each of which is a solve.

    Raises:
        ExpressionError: an argument that makes no sense.
        FactsError: H + λ I is singular.
        ConvergenceError: a solve that does not converge (raise the damping), or a tolerance that is not reached.

    >>> import torch
    >>> from curvalg import Problem
    >>> generator = torch.Generator().manual_seed(0)
    >>> X = torch.randn(500, 3, dtype=torch.float64, generator=generator)
    >>> y = X.sum(1, keepdim=True) + torch.randn(500, 1, dtype=torch.float64, generator=generator)
    >>> model = torch.nn.Linear(3, 1, bias=False).double()
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(torch.linalg.lstsq(X, y).solution.T)
    >>> estimate = tic(Problem(model, lambda z, t: 0.5 * (z - t).square().mean(), (X, y)))
    >>> abs(estimate.value - 3) < 0.5, estimate.method
    (True, 'exact')
    """
    begin = time.perf_counter()
    require_problem(problem, "tic")
    H, C = Hessian() if hessian is None else hessian, Covariance() if covariance is None else covariance
    for what, expr in (("hessian", H), ("covariance", C)):
        fits = isinstance(expr, Expr) and expr.domain in ("parameters", None) and expr.codomain == expr.domain
        if not fits or expr.domain_params is not None or expr.codomain_params is not None:
            raise ExpressionError(
                f"tic: {what} is an expression on parameters, all of them, such as registry.build('ggn'), got {expr!s}; for "
                "some of them make a Problem with params=..."
            )
    require_positive(damping, "a damping ≥ 0", zero=True)
    damped = H + damping * Identity
    if problem.size <= {"auto": DENSE, "exact": MOST}.get(method, 0):
        A, B = (wide(expr.lower(problem).to_dense()) for expr in (damped, C))
        sizes = torch.linalg.svdvals(A)
        # Below this the smallest are rounding errors of the products, whose inverse means nothing.
        if not bool(sizes[-1] > len(A) * epsilon(problem) * sizes[0]):
            raise FactsError(
                f"tic: {damped} is singular up to rounding (singular values from {float(sizes[-1]):.1e} to "
                f"{float(sizes[0]):.1e}); pass damping= (λ > 0)"
            )
        return exactly(float(torch.linalg.solve(A, B).trace()), problem.size, begin)
    try:
        solve, middle = inverse(damped).lower(problem), C.lower(problem)
    except FactsError as error:
        raise FactsError(f"tic: {error}; here by damping= (λ > 0)") from error
    estimate = trace(
        _target(solve, middle, damped, C),
        products=products,
        tol=tol,
        method=method,
        seed=seed,
        maxiter=maxiter,
        on_fail=on_fail,
        checkpoint=checkpoint,
        progress=progress,
    )
    # Solves end at this relative residual, which no leave-one-out estimate sees.
    inexact = abs(float(estimate.value)) * default_rtol(problem)
    return replace(estimate, error=math.hypot(float(estimate.error), inexact))


def _target(solve: CurvatureOperator, covariance: CurvatureOperator, H: Expr, C: Expr) -> Target:
    """The matrix Vᵀ H⁻¹ V where C = V Vᵀ has known columns, which is symmetric and smaller; else H⁻¹ C."""
    problem, name = solve.problem, f"inverse({H}) @ ({C})"

    def subject() -> Options:
        return {**target(solve).subject(), "covariance": str(C)}

    if isinstance(C, Term) and problem.data.ordered and why_not_factored([(1.0, C)], problem) is None:
        with problem.differentiating():
            columns = WeightedFactor(problem, solve.snapshot, [(1.0, C)])
            columns.factor.prepare(problem, solve.snapshot)
        size, psd = columns.factor.size, bool(solve.facts.psd)

        def multiply(y: Tensor) -> Tensor:
            with problem.differentiating():
                pulled = columns.synthesise(y)
            solved = solve @ pulled
            with problem.differentiating():
                return columns.analyse(solved)
    else:
        made, psd = target(covariance), False
        size = made.size

        def multiply(y: Tensor) -> Tensor:
            product: Tensor = solve @ made.multiply(y)
            return product

    space, choices = Space(size, None, problem.dtype, problem.device), problem.measured
    return Target(name, (size, size), space, multiply, multiply, psd or None, subject, psd=psd, choices=choices)

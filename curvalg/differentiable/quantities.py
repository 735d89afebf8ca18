"""Numbers of curvature with gradients: quadratic forms, traces, log-determinants, the top eigenvalue, TIC."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvalg.differentiable.damping import Damping, damping_vector
from curvalg.differentiable.number import Part, number
from curvalg.distributed.group import shared_call
from curvalg.errors import ExpressionError, FactsError, OptionError, VectorError
from curvalg.estimate import eigsh
from curvalg.estimate import logdet as estimate_logdet
from curvalg.expr import Diagonal, Expr, inverse
from curvalg.expr.terms import Covariance, Hessian
from curvalg.lowering import CurvatureOperator
from curvalg.lowering.inverses.rounding import epsilon
from curvalg.lowering.operators.live_form import DifferentiableSum
from curvalg.lowering.operators.third_order import terms_of
from curvalg.lowering.vectors import Vector, parse
from curvalg.problem import Problem
from curvalg.problem.model.sharded import require_whole_vectors
from curvalg.solve import condition
from curvalg.tensors.memory import wide
from curvalg.tensors.random_numbers import normals

MOST = 4096
"""The most parameters whose matrix is made where exactness is asked for."""


@shared_call
def quadratic_form(expr: Expr, problem: Problem, left: Vector, right: Vector, *, damping: Damping = 0.0) -> Tensor:
    """The number Σₖ lₖᵀ (A(θ) + diag d) rₖ, with gradients.

    Args:
        expr: A, a sum of terms that take one pass over the data (hessian, ggn, fisher, residual, covariance) and of
            centered_covariance.
        problem: with a loss.
        left, right: l and r, (D,) or (D, K), of any kind that a product takes; where these are tensors that require gradients,
            they get them as well.
        damping: d, see :func:`logdet`.

    Raises:
        ExpressionError: another kind of expression.
        ProblemError: the model lacks a third derivative (when ``backward`` is called).
        VectorError: vectors that do not fit.
        OptionError: a damping that does not fit.

    >>> import torch
    >>> from curvalg import Problem, registry
    >>> net = torch.nn.Linear(3, 1)
    >>> problem = Problem(net, torch.nn.BCEWithLogitsLoss(), (torch.randn(6, 3), torch.ones(6, 1)))
    >>> sharpness = quadratic_form(registry.build("hessian"), problem, problem.gradient(), problem.gradient())
    >>> sharpness.backward()
    >>> net.weight.grad.shape
    torch.Size([1, 3])
    """
    matrix, op, diagonal = _prepared(expr, problem, damping)
    l, r = (parse(x, op._domain, op._domain).columns for x in (left, right))  # noqa: E741
    if l.shape != r.shape:
        raise VectorError(f"expected left and right of one shape, got {tuple(l.shape)} and {tuple(r.shape)}")
    d = diagonal.detach()[:, None]
    product = (op @ r) + d * r
    value = wide(l * product).sum()
    known = [(diagonal, lambda: (l * r).sum(1))]
    for given, other in ((left, lambda: product), (right, lambda: (op @ l) + d * l)):
        if isinstance(given, Tensor) and given.requires_grad:
            known.append((given, other))
    return number(value.to(problem.dtype), problem, op.snapshot, lambda: [Part(matrix, l, r)], known)


@shared_call
def trace(expr: Expr, problem: Problem, *, damping: Damping = 0.0, probes: int | None = None, seed: int = 0) -> Tensor:
    """The trace of A(θ) + diag d, with gradients.

    Args:
        expr, problem, damping: as of :func:`logdet`.
        probes: random signs z instead of all D columns: the mean of zᵀAz, whose gradient is without bias. The attribute
            ``error`` of the result is one standard error of the value; 0.0 where it is exact.
        seed: of the probes.

    Raises:
        ExpressionError, ProblemError, OptionError: as of :func:`logdet`.
    """
    matrix, op, diagonal = _prepared(expr, problem, damping)
    columns, weight = _columns(problem, probes, seed, "trace")
    d = diagonal.detach()[:, None]
    samples = wide(columns * ((op @ columns) + d * columns)).sum(0)
    value = samples.sum() * weight
    parts = [Part(matrix, columns * weight, columns)]
    made = number(
        value.to(problem.dtype), problem, op.snapshot, lambda: parts, [(diagonal, lambda: torch.ones_like(diagonal))]
    )
    return _with_error(made, 0.0 if probes is None else _standard_error(samples))


@shared_call
def logdet(expr: Expr, problem: Problem, *, damping: Damping = 0.0, probes: int | None = None, seed: int = 0) -> Tensor:
    """The number log det (A(θ) + diag d), with gradients: ∂ = tr (A + diag d)⁻¹ ∂A.

    With A the ggn and d a prior precision it is the part of the Laplace evidence that depends on curvature, so that priors,
    one for each parameter or layer, are learned by descending it.

    Args:
        expr: A, a sum of terms that take one pass over the data (hessian, ggn, fisher, residual, covariance), of
            centered_covariance and of the identity.
        problem: with a loss.
        damping: d: a number, D of them, or a mapping from names of parameters to numbers or tensors of their shapes. Tensors
            that require gradients get them.
        probes: random signs instead of all D columns, for more than 4096 parameters: the value by Lanczos quadrature, with the
            attribute ``error``, one standard error; its gradient by as many solves, without bias.
        seed: of the probes.

    Raises:
        ExpressionError: another kind of expression, or more than 4096 parameters without probes.
        FactsError: A + diag d is not positive definite.
        ProblemError: the model lacks a third derivative, or torch's formula for it is wrong (when ``backward`` is called).
        OptionError: a damping or number of probes that does not fit.

    >>> import torch
    >>> from curvalg import Problem, registry
    >>> net = torch.nn.Linear(3, 2)
    >>> problem = Problem(net, torch.nn.CrossEntropyLoss(), (torch.randn(8, 3), torch.randint(2, (8,))))
    >>> prior = {name: torch.tensor(0.5, requires_grad=True) for name in problem.layout.names}
    >>> logdet(registry.build("ggn"), problem, damping=prior).backward()
    >>> prior["weight"].grad > 0
    tensor(True)
    """
    matrix, op, diagonal = _prepared(expr, problem, damping)
    if probes is None:
        eye, _ = _columns(problem, None, seed, "logdet")
        A = _dense(op, diagonal)
        factor, failed = torch.linalg.cholesky_ex(A)
        # Rounding can leave a matrix without an inverse a Cholesky factor.
        noise = max(len(A) * torch.finfo(A.dtype).eps, epsilon(problem))
        if bool(failed) or not condition(A, lambda b: torch.cholesky_solve(b, factor)) * noise < 1:
            raise _not_definite("logdet", expr)
        inverted = torch.cholesky_inverse(factor)
        value, error = 2 * factor.diagonal().log().sum(), 0.0
        left = inverted.to(problem.dtype)
    else:
        eye, weight = _columns(problem, probes, seed, "logdet")
        damped = expr + Diagonal(diagonal.detach())
        estimate = estimate_logdet(damped.lower(problem), products=max(60, 10 * probes), seed=seed)
        value, error = torch.tensor(float(estimate.value), dtype=torch.float64, device="cpu"), float(estimate.error)
        left = weight * (inverse(damped).lower(problem) @ eye)
    parts = [Part(matrix, left, eye)]
    known = [(diagonal, lambda: (left * eye).sum(1))]
    made = number(value.to(problem.device, problem.dtype), problem, op.snapshot, lambda: parts, known)
    return _with_error(made, error)


@shared_call
def top_eigenvalue(
    expr: Expr, problem: Problem, *, damping: Damping = 0.0, tol: float | None = None, seed: int = 0
) -> Tensor:
    """The largest eigenvalue λ of A(θ) + diag d, with gradients: ∂λ = vᵀ ∂A v for its eigenvector v.

    Args:
        expr, problem, damping: as of :func:`logdet`.
        tol: relative residual at which the eigenpair is taken; None: 1e-9 in float64, 1e-5 in float32.
        seed: of the start.

    Raises:
        FactsError: the two largest eigenvalues agree to within rounding, so that there is no gradient.
        ConvergenceError: the eigenpair is not found to the tolerance.
        ExpressionError, ProblemError, OptionError: as of :func:`logdet`.
    """
    matrix, op, diagonal = _prepared(expr, problem, damping)
    damped = op if not bool(diagonal.detach().any()) else (expr + Diagonal(diagonal.detach())).lower(problem)
    tol = (1e-9 if problem.dtype == torch.float64 else 1e-5) if tol is None else tol
    pairs = eigsh(damped, min(2, problem.size), which="LA", tol=tol, seed=seed)
    values, vectors = pairs
    size = float(values.abs().max())
    if len(values) > 1 and float(values[-1] - values[-2]) <= 10 * max(tol, 100 * epsilon(problem)) * size:
        raise FactsError(
            f"top_eigenvalue: the two largest eigenvalues of {expr} are {float(values[-2]):.6g} and {float(values[-1]):.6g}, "
            "equal to within rounding, so that the largest has no gradient; take trace or logdet, or move the parameters"
        )
    v = vectors[:, -1:]
    v = v / v.norm()
    parts = [Part(matrix, v, v)]
    known = [(diagonal, lambda: v[:, 0].square())]
    return number(values[-1].to(problem.device, problem.dtype), problem, op.snapshot, lambda: parts, known)


@shared_call
def tic(
    problem: Problem,
    *,
    hessian: Expr | None = None,
    covariance: Expr | None = None,
    damping: Damping = 0.0,
    probes: int | None = None,
    seed: int = 0,
) -> Tensor:
    """The trace tr (H + diag d)⁻¹ C in Takeuchi's information criterion, with gradients; see :func:`curvalg.estimate.tic`.

    Args:
        problem: with a loss.
        hessian, covariance: H and C; by default ``hessian`` and ``covariance``.
        damping: d, see :func:`logdet`.
        probes: random signs z instead of all D columns, for more than 4096 parameters: the mean of zᵀ (H + diag d)⁻¹ C z, by
            one solve for each, whose gradient is without bias and takes another. The attribute ``error`` of the result is one
            standard error of the value; 0.0 where it is exact.
        seed: of the probes.

    Raises:
        FactsError: H + diag d is singular.
        ConvergenceError: a solve did not reach its tolerance, with probes.
        ExpressionError, ProblemError, OptionError: as of :func:`logdet`.
    """
    H, C = Hessian() if hessian is None else hessian, Covariance() if covariance is None else covariance
    of_h, op, diagonal = _prepared(H, problem, damping)
    of_c, middle, _ = _prepared(C, problem, 0.0)
    columns, weight = _columns(problem, probes, seed, "tic")
    if probes is not None:
        damped = inverse(H + Diagonal(diagonal.detach())).lower(problem)
        solved, pushed = weight * (damped @ columns), middle @ columns
        samples = wide(solved * pushed).sum(0) / weight

        def sampled() -> list[Part]:
            return [Part(of_c, solved, columns), Part(of_h, -solved, damped @ pushed)]

        by_diagonal = [(diagonal, lambda: -(solved * (damped @ pushed)).sum(1))]
        made = number(samples.mean().to(problem.dtype), problem, op.snapshot, sampled, by_diagonal)
        return _with_error(made, _standard_error(samples))
    A, B = _dense(op, diagonal), wide(middle.to_dense())
    sizes = torch.linalg.svdvals(A)
    if not bool(sizes[-1] > len(A) * epsilon(problem) * sizes[0]):
        raise FactsError(f"tic: {H} is singular up to rounding; pass damping= (a number > 0)")
    inverted = torch.linalg.inv(A)
    both = inverted @ B @ inverted

    def parts() -> list[Part]:
        by_c, by_h = ((m + m.T).div(2).to(problem.dtype) for m in (inverted, both))
        return [Part(of_c, by_c, columns), Part(of_h, -by_h, columns)]

    known = [(diagonal, lambda: -both.diagonal().to(problem.dtype))]
    made = number((inverted @ B).trace().to(problem.dtype), problem, op.snapshot, parts, known)
    return _with_error(made, 0.0)


def _prepared(expr: Expr, problem: Problem, damping: Damping) -> tuple[DifferentiableSum, CurvatureOperator, Tensor]:
    if not isinstance(expr, Expr):
        raise ExpressionError(f"expected an expression such as registry.build('ggn'), got {type(expr).__name__}")
    if not isinstance(problem, Problem):
        raise ExpressionError(f"expected a curvalg.Problem, got {type(problem).__name__}")
    require_whole_vectors(problem, "curvalg.differentiable")
    return terms_of(expr), expr.lower(problem), damping_vector(damping, problem)


def _dense(op: CurvatureOperator, diagonal: Tensor) -> Tensor:
    matrix = wide(op.to_dense())
    matrix = (matrix + matrix.T) / 2
    matrix.diagonal().add_(wide(diagonal.detach()))
    return matrix


def _columns(problem: Problem, probes: int | None, seed: int, what: str) -> tuple[Tensor, float]:
    """All unit vectors, or random signs, and what a sum over them is multiplied by."""
    if probes is None:
        if problem.size > MOST:
            raise ExpressionError(
                f"{what}: {problem.size} parameters are more than the {MOST} whose matrix is made; pass probes=, or make a "
                "Problem of some of them with params="
            )
        return torch.eye(problem.size, dtype=problem.dtype, device=problem.device), 1.0
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 2:
        raise OptionError(f"{what}: probes is an integer of at least 2, got {probes!r}")
    return normals((problem.size, probes), seed).sign().to(problem.device, problem.dtype), 1 / probes


def _standard_error(samples: Tensor) -> float:
    return float(samples.std()) / math.sqrt(len(samples))


def _with_error(made: Tensor, error: float) -> Tensor:
    made.error = error  # type: ignore[attr-defined]
    return made


def _not_definite(what: str, expr: Expr) -> FactsError:
    return FactsError(f"{what}: {expr} with this damping is not positive definite; raise damping=, or take the ggn")

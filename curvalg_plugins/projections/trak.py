"""Scores of training samples for queries in a random subspace."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from curvalg import FactsError, OptionError, Problem
from curvalg_plugins.projections.projected_gradients import Kind, project_gradients


def trak_scores(
    problem: Problem,
    queries: Problem,
    dimensions: int,
    *,
    damping: float = 0.0,
    kind: Kind = "dense",
    seed: int = 0,
) -> Tensor:
    """The kernel φ_qᵀ (ΦᵀΦ + c I)⁻¹ φ_n of random projections φ of gradients, for every query and training sample (Q, N).

    Φ (N, k) are the gradients of the training samples' own losses, projected by :func:`project_gradients`. Without a projection
    it would be ``influence(inverse(covariance + c / N * Identity).lower(problem), queries)``, for a mean loss of N samples. For
    the scores of Park et al., arXiv 2303.14186, of one model, give both problems the sum of the margins f = log p / (1 − p) as
    their loss, and multiply the columns by 1 − pₙ.

    Args:
        problem: the training samples.
        queries: of the same parameters; every process has all of them, or its part of a problem with ``group=``.
        dimensions: k; all training samples take N k numbers.
        damping: c ≥ 0; 0 needs N ≥ k independent gradients.
        kind, seed: of the projection, as of :func:`project_gradients`.

    Raises:
        OptionError: arguments that make no sense, or queries of other parameters.
        FactsError: ΦᵀΦ + c I is singular.
        ProblemError: queries whose model computes another function; as of :func:`project_gradients`.
        LossError: as of :func:`project_gradients`.

    >>> import torch
    >>> from curvalg import Problem
    >>> net, loss = torch.nn.Linear(3, 1), torch.nn.MSELoss()
    >>> problem = Problem(net, loss, (torch.randn(6, 3), torch.randn(6, 1)))
    >>> test = Problem(net, loss, (torch.randn(4, 3), torch.randn(4, 1)))
    >>> trak_scores(problem, test, 2, damping=1e-3).shape
    torch.Size([4, 6])
    """
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 <= damping < math.inf:
        raise OptionError(f"trak_scores: damping is a finite number of at least 0, got {damping!r}")
    _require_same(problem, queries)
    training, asking = (
        project_gradients(p, dimensions, kind=kind, seed=seed).to(torch.float64) for p in (problem, queries)
    )
    kernel = training.T @ training
    kernel.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(kernel)
    smallest, largest = factor.diagonal().square().aminmax()
    if bool(failed) or float(smallest) <= len(kernel) * torch.finfo(problem.dtype).eps * float(largest):
        raise FactsError(
            f"trak_scores: the {dimensions} x {dimensions} kernel of {len(training)} training samples is singular; raise "
            "damping=, or take fewer dimensions than there are independent gradients"
        )
    return (asking @ torch.cholesky_solve(training.T, factor)).to(problem.dtype)


def _require_same(problem: Problem, queries: Problem) -> None:
    for given in (problem, queries):
        if not isinstance(given, Problem):
            raise OptionError(f"trak_scores: expected two problems, got {type(given).__name__}")
    if problem.layout.shapes != queries.layout.shapes:
        different = sorted(set(problem.layout.names).symmetric_difference(queries.layout.names))
        raise OptionError(f"trak_scores: expected queries of the same parameters, but they differ in {different[:5]}")
    here, there = problem.snapshot().state, queries.snapshot().state
    if any(not torch.equal(here[name], there[name]) for name in problem.layout.names):
        raise OptionError("trak_scores: expected queries at the same parameters, but their values differ")
    problem.require_same_function(queries, "trak_scores: queries")

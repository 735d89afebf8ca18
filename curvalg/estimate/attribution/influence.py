"""Influence functions: scores of training samples for queries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import overload

import torch
from torch import Tensor

from curvalg.distributed.group import Group, group_of, shared_call
from curvalg.errors import ExpressionError, OptionError, VectorError
from curvalg.estimate.attribution.influence_run import DISCARDED, LAYER, NORMS, SCORES, SIDES, InfluenceRun
from curvalg.estimate.attribution.influence_scores import InfluenceScores, ScoreBatch
from curvalg.estimate.attribution.query_scores import By
from curvalg.estimate.attribution.rank_error import RankError
from curvalg.estimate.attribution.ranking import Ranking
from curvalg.estimate.attribution.sample_gradients import in_order, sample_gradients
from curvalg.estimate.request import require_count, require_one_of
from curvalg.estimate.target import require_operator
from curvalg.lowering import CurvatureOperator
from curvalg.lowering.inverses.rounding import noise
from curvalg.lowering.vectors import Vector, parse
from curvalg.problem import Layout, Problem
from curvalg.problem.model.sharded import require_whole_vectors
from curvalg.runs.checkpoint import Checkpoint
from curvalg.runs.run import run
from curvalg.runs.run_file import FileName, require_place
from curvalg.runs.run_identity import run_identity
from curvalg.runs.run_state import Options

FEW = 8
"""Vectors up to which a pass with a tangent for each is taken: it needs no layers."""


@overload
def influence(
    op: CurvatureOperator,
    queries: Problem | None = None,
    *,
    by: By = "total",
    topk: int | None = None,
    query_batch: int = 64,
    query_rank: int | None = None,
    checkpoint: FileName | None = None,
    progress: bool = False,
) -> InfluenceScores: ...


@overload
def influence(op: CurvatureOperator, queries: Vector) -> Tensor: ...


@shared_call
def influence(
    op: CurvatureOperator,
    queries: Problem | Vector | None = None,
    *,
    by: By = "total",
    topk: int | None = None,
    query_batch: int = 64,
    query_rank: int | None = None,
    checkpoint: FileName | None = None,
    progress: bool = False,
) -> InfluenceScores | Tensor:
    """Inner products ⟨∇cₙ, A v⟩ of every training sample n for some gradients v: what it does to the loss of a query.

    With A = (H + λ I)⁻¹ at a minimiser of L and v = ∇ℓ of a query's own loss, the score predicts by how much that loss changes
    when sample n is left out of the training data, since θ moves by (H + λ I)⁻¹ ∇cₙ: negative ones do harm. cₙ is the share of
    the whole loss: for an unweighted mean loss N⁻¹ times the sample's own loss. Koh and Liang, arXiv 1703.04730; other
    libraries leave out N⁻¹, or the sign.

    ``influence.stream(...)`` gives the scores as they come, and keeps none (:func:`influence_stream`).

    No N gradients exist at any time, and none of N × D numbers. Where A is block-diagonal in Kronecker eigenbases (EKFAC,
    KFAC) inputs and deltas of the layers are changed into these, if that is cheaper, after one comparison with a product of
    the operator; Grosse et al., arXiv 2308.03296.

    Args:
        op: A, an operator on all parameters, such as ``inverse(registry.build("ekfac") + 1e-2 * Identity).lower(problem)``.
            Its problem has the training samples.
        queries: a :class:`~curvalg.Problem` of the same parameters with its own data and loss, whose samples ask: v = s ∇c,
            the gradient of the sample's own loss (s = N for a mean loss). None: the training samples themselves. Or gradients
            v, (D,) or (D, P), of any kind that a product takes.
        by: "total"; "layer", scores by the module that owns the parameters, whose sum is the total; or "position", by the
            positions of a training row (tokens), and by layer where these see different numbers of positions.
        topk: keep so many of the largest and of the smallest scores of each query alone; None: all scores.
        query_batch: queries at a time, each of as much memory as the parameters; there is a pass over the training data for
            each batch.
        query_rank: r, for much larger batches of queries: of the product A v of each, the weight of a layer (out x in) is held
            as its best approximation U Vᵀ of rank r, in r (out + in) numbers, and training samples are multiplied with these
            factors. The result's ``error`` has the norm of what is missing, and bounds of all errors. For operators on layers
            by themselves, such as EKFAC and KFAC. None: products are held as they are.
        checkpoint: a file that scores are written to now and then, and the run is resumed from, if it is there.
        progress: show queries done and expected.

    Returns:
        For a problem :class:`~curvalg.estimate.InfluenceScores`, whose ``scores`` are (Q, N). For gradients the tensor (N, P),
        or (N,) for a single vector. Samples in the order of the data; with ``samples="position"`` the positions of a row follow
        each other in row-major order.

    Raises:
        ExpressionError: the operator is not one on all parameters of its problem; an argument that makes no sense; queries of
            other parameters.
        VectorError: vectors that do not fit.
        ConvergenceError: a solve did not reach its tolerance.
        ProblemError: samples influence each other (batch-norm in training mode); queries whose model computes another function
            of the parameters.
        CheckpointError: the file is of another run, or damaged.

    >>> import torch
    >>> from curvalg import Identity, Problem, inverse, registry
    >>> net, loss = torch.nn.Linear(3, 1), torch.nn.MSELoss()
    >>> problem = Problem(net, loss, (torch.randn(6, 3), torch.randn(6, 1)))
    >>> test = Problem(net, loss, (torch.randn(4, 3), torch.randn(4, 1)))
    >>> op = inverse(registry.build("ekfac") + 0.1 * Identity).lower(problem)
    >>> influence(op, test).scores.shape, influence(op, problem.gradient()).shape
    (torch.Size([4, 6]), torch.Size([6]))
    """
    require_all_parameters(op, "influence")
    require_one_of(by, "by", ("total", "layer", "position"))
    require_count(query_batch, "query_batch")
    if query_rank is not None:
        require_count(query_rank, "query_rank")
    require_place(checkpoint)
    if queries is not None and not isinstance(queries, Problem):
        for name, given, default in (
            ("by", by, "total"),
            ("topk", topk, None),
            ("query_rank", query_rank, None),
            ("checkpoint", checkpoint, None),
        ):
            if given != default:
                raise ExpressionError(
                    f"{name}= is for queries that are a Problem, but they are gradients; leave it out"
                )
        return _of_gradients(op, queries)
    if topk is not None:
        require_count(topk, "topk")
        if by != "total":
            raise OptionError(f"topk= is for scores by='total', got by={by!r}; leave one of them out")
    return _of_samples(op, queries, by, topk, query_batch, query_rank, checkpoint, progress)


def _of_samples(
    op: CurvatureOperator,
    queries: Problem | None,
    by: By,
    topk: int | None,
    query_batch: int,
    query_rank: int | None,
    checkpoint: FileName | None,
    progress: bool,
) -> InfluenceScores:
    made = _run_of(op, queries, by, topk, query_batch, query_rank)
    file = None if checkpoint is None else Checkpoint(checkpoint, _subject(made), op.problem.measured)
    outcome = run(made, checkpoint=file, progress=progress)
    tensors = outcome.state.tensors
    if not tensors:
        raise KeyboardInterrupt("interrupted before there was any score")
    order = tensors["queries"].argsort()
    every = {name.removeprefix(LAYER): t[order] for name, t in tensors.items() if name.startswith(SCORES)}
    return InfluenceScores(
        method="influence",
        products=outcome.state.products,
        seconds=outcome.seconds,
        converged=not outcome.partial,
        partial=outcome.partial,
        scores=None if topk is not None else every[SCORES] if SCORES in tensors else every,
        topk=None if topk is None else Ranking(*(tensors[side][order] for side in SIDES)),
        iterations=tensors["iterations"][order] if "iterations" in tensors else None,
        residuals=tensors["residuals"][order] if "residuals" in tensors else None,
        error=None if query_rank is None else _error(query_rank, tensors, order),
    )


def influence_stream(
    op: CurvatureOperator,
    queries: Problem | None = None,
    *,
    by: By = "total",
    query_batch: int = 64,
    query_rank: int | None = None,
) -> Iterator[ScoreBatch]:
    """The scores of :func:`influence`, some queries and training samples after the others, without keeping any.

    Args:
        op, queries, by, query_batch, query_rank: as of :func:`influence`.

    Yields:
        :class:`~curvalg.estimate.ScoreBatch`: the numbers of the queries and of the samples, and their scores.

    Raises:
        ExpressionError, ConvergenceError, ProblemError: as of :func:`influence`.

    Koh and Liang, arXiv 1703.04730.

    >>> import torch
    >>> from curvalg import Identity, Problem, inverse, registry
    >>> problem = Problem(torch.nn.Linear(3, 1), torch.nn.MSELoss(), (torch.randn(6, 3), torch.randn(6, 1)))
    >>> op = inverse(registry.build("ggn") + 0.1 * Identity).lower(problem)
    >>> [(len(part.queries), part.samples) for part in influence_stream(op, query_batch=4)]
    [(4, slice(0, 6, None)), (2, slice(0, 6, None))]
    """
    require_all_parameters(op, "influence_stream")
    require_one_of(by, "by", ("total", "layer", "position"))
    if query_rank is not None:
        require_count(query_rank, "query_rank")
    require_count(query_batch, "query_batch")
    group = group_of(op, queries)
    with group.together("influence_stream"):
        parts = _run_of(op, queries, by, None, query_batch, query_rank).stream()
    return parts if group.alone else _together(group, parts)


influence.stream = influence_stream  # type: ignore[attr-defined]  # the same scores, as they come


def _together(group: Group, parts: Iterator[ScoreBatch]) -> Iterator[ScoreBatch]:
    """Parts that processes make together, and that each hands out by itself."""
    while True:
        with group.together("influence_stream"):
            part = next(parts, None)
        if part is None:
            return
        yield part


def require_all_parameters(op: CurvatureOperator, function: str) -> None:
    require_operator(op, function)
    require_whole_vectors(op.problem, function)
    size = op.problem.size
    if "outputs" in (op.expr.domain, op.expr.codomain) or op.shape != (size, size):
        raise ExpressionError(
            f"{function}: expected an operator on all {size} parameters, but {op.expr} is {op.shape[0]} x {op.shape[1]}"
        )


def _run_of(
    op: CurvatureOperator, queries: Problem | None, by: By, topk: int | None, batch: int, rank: int | None
) -> InfluenceRun:
    problem = op.problem
    problem.check(op.snapshot)
    asking = problem if queries is None else queries
    if not isinstance(asking, Problem):
        raise ExpressionError(f"expected queries to be a Problem, got {type(asking).__name__}")
    snapshot = op.snapshot if asking is problem else asking.snapshot()
    if asking is not problem:
        if asking.layout.shapes != problem.layout.shapes:
            raise ExpressionError(
                f"expected queries of the parameters of the operator, but {_difference(problem.layout, asking.layout)}; make "
                "the problem of the queries with the same model and params=, as problem.with_data(data) does"
            )
        if asking.dtype != problem.dtype or asking.device != problem.device:
            raise ExpressionError(
                f"expected queries in the precision and on the device of the operator, {problem.dtype} on {problem.device}, "
                f"got {asking.dtype} on {asking.device}; convert the model and the data of one of them"
            )
        if any(not torch.equal(op.snapshot.state[name], snapshot.state[name]) for name in problem.layout.names):
            raise ExpressionError("expected queries at the parameters of the operator, but their values differ")
        problem.require_same_function(asking, "influence: queries")
    asking.need_loss()
    problem.need_loss()
    return InfluenceRun(op, asking, snapshot, by, topk, batch, rank)


def _error(rank: int, tensors: dict[str, Tensor], order: Tensor) -> RankError:
    discarded = {n.removeprefix(DISCARDED): t[order] for n, t in tensors.items() if n.startswith(DISCARDED)}
    norms = {n.removeprefix(NORMS): t for n, t in tensors.items() if n.startswith(NORMS)}
    return RankError(rank, discarded, norms)


def _subject(made: InfluenceRun) -> Options:
    """The fingerprint of a run: of the operator, and of the queries."""
    op = made.op
    asked = run_identity(op.expr, made.problem, made.snapshot, noise(made.problem))
    own = run_identity(op.expr, op.problem, op.snapshot, noise(op.problem))
    return {**own, **{f"queries: {name}": value for name, value in asked.items() if name != "expression"}}


@shared_call
def _of_gradients(op: CurvatureOperator, gradients: Vector) -> Tensor:
    problem = op.problem
    operand = parse(gradients, op._domain, op._domain)
    if not operand.columns.shape[1]:
        raise VectorError("expected at least one gradient v to ask with, got (D, 0); pass (D,) or (D, P)")
    solved = op @ operand.columns
    with problem.differentiating():
        parts = (_by_tangents if solved.shape[1] <= FEW else _by_layers)(op, solved)
    result = problem.group.rows(torch.cat(parts) if parts else solved.new_zeros(0, solved.shape[1]))
    return result[:, 0] if result.shape[1] == 1 and _single(gradients) else result


def _by_tangents(op: CurvatureOperator, solved: Tensor) -> list[Tensor]:
    parts = []
    for evaluation in op.problem.evaluations(op.snapshot, order_matters=True):
        columns: list[Tensor] = []
        for x in solved.unbind(1):
            batch, tangent = evaluation.push(x)
            columns.append(batch.dot(batch.loss_gradient, tangent).reshape(-1))
        parts.append(torch.stack(columns, 1))
    return parts


def _by_layers(op: CurvatureOperator, solved: Tensor) -> list[Tensor]:
    directions = op.problem.layout.unflatten_rows(solved.T.contiguous())
    parts = []
    for samples in sample_gradients(op.problem, op.snapshot):
        found = [
            torch.stack([record.project(directions) for record in records]).sum(0) for _, records in samples.parts()
        ]
        parts.append(in_order(found).T)
    return parts


def _single(vector: Vector) -> bool:
    return getattr(vector, "ndim", None) == 1 or not hasattr(vector, "ndim")


def _difference(of_operator: Layout, of_queries: Layout) -> str:
    """Where the parameters of two problems differ, of which some do."""
    ours, theirs = of_operator.shapes, of_queries.shapes
    for name, shape in ours.items():
        if name not in theirs:
            return f"the problem of the queries has no {name!r}"
        if theirs[name] != shape:
            return f"{name!r} is {tuple(shape)} there and {tuple(theirs[name])} in the problem of the queries"
    return f"the operator's problem has no {next(name for name in theirs if name not in ours)!r}"

"""Verdicts: a route proves itself once a state, and on every batch with operations that no verified one had."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvalg.errors import ProblemError
from curvalg.problem.model_call import ModelCall
from curvalg.tensors.graph import coarsest_dtype, operations

C = TypeVar("C", bound=ModelCall)


class RouteError(ProblemError):
    """A route that was right on other batches is wrong on this one; another is taken by now."""


def verdict(
    evaluation: ModelCall,
    route: Hashable,
    check: Callable[[], str | None],
    graphs: Iterable[Tensor | GradientEdge | None] | frozenset[str] = (),
) -> str | None:
    """Why a route must not be used at this state for these parameters, or None.

    It is found out once, and again on a batch whose graph has operations that no verified one had: rows that go to an expert
    of their own, a branch that the first batch does not take.

    Args:
        evaluation: of the batch at hand.
        route: its name.
        check: what is wrong with it on this batch, or None.
        graphs: the graphs that show its operations, or these where they are known; graphs may be made by the check.
    """

    def shown() -> frozenset[str]:
        return graphs if isinstance(graphs, frozenset) else operations(graphs)

    problem, sworn = evaluation.problem, evaluation.snapshot.sworn
    if not problem.verify:
        return None
    oath = (route, tuple(problem.layout.names))
    reason, known = sworn.get(oath, (None, None))
    if known is None or (reason is None and not (found := shown()) <= known):
        reason = check()
        sworn[oath] = reason, (shown() if known is None else known | found)
    return reason


def rounding(evaluation: ModelCall, z: Tensor) -> float:
    """The relative error up to which two computations of the model agree: the square root of its coarsest epsilon."""
    structure = evaluation.snapshot.structure
    if structure.found.epsilon is None or z.requires_grad:
        dtypes = {z.dtype, *evaluation.problem.layout.dtypes.values(), coarsest_dtype(z)}
        if (autocast := evaluation.problem.autocast) is not None:
            dtypes.add(autocast)
        epsilon = max(torch.finfo(dtype).eps for dtype in dtypes)
        if z.is_cuda and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32):
            epsilon = max(epsilon, 1e-3)
        structure.found.epsilon = max(epsilon, structure.found.epsilon or 0.0)
    return float(structure.found.epsilon**0.5)


FAILURES = (ProblemError, RuntimeError, TypeError, ValueError, NotImplementedError)
"""What a model may raise that is called in another dtype or on fewer rows than it was made for."""

ROWS = 2
"""Rows of a batch that second derivatives are compared on, where these can be computed alone."""
SMALL = 2**20
"""Rows times parameters from which a call costs less for few rows than for all."""
WORK = 2**12
"""Numbers that an operation gives, in the mean, from which it takes longer than its call: convolutions and long sequences work
much for each row with few parameters."""


def few_rows(evaluation: C) -> C:
    """The first rows of a batch, where they can be computed without the others and that saves work; else the batch."""
    problem, sample = evaluation.problem, evaluation.sample
    heavy = (evaluation.snapshot.structure.found.work or 0.0) >= WORK or sample.rows * problem.size >= SMALL
    if sample.rows <= ROWS or not heavy:
        return evaluation
    if problem.model.batch_statistics or problem.draws.mode != "refuse":
        return evaluation
    return evaluation.of(sample.head(ROWS))

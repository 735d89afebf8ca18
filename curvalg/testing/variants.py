"""Other forms of a problem: other batches, another precision, model calls counted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from curvalg.distributed.making import make_group
from curvalg.problem import Batch, Layout, Problem
from curvalg.problem.data.batches import call_model
from curvalg.problem.model.parameters import Forms
from curvalg.problem.passes.joining import join
from curvalg.tensors import trees
from curvalg.tensors.backward import backward
from curvalg.testing.outcome import NotApplicable


def variant(
    problem: Problem, *, cache: int | None = None, columns: Any = None, output_memory: float | None = None
) -> Problem:
    """A twin that keeps nothing of what the problem has computed; model and data are shared."""
    _ = problem.totals  # a callable's reduction is given only once
    twin = copy.copy(problem)
    if cache is not None:
        twin.cache = cache
    if columns is not None:
        twin.columns = columns
    if output_memory is not None:
        twin.output_memory = output_memory
    return twin


def rebatched(problem: Problem, sizes: Sequence[int]) -> Problem:
    """The problem with its samples in the same order, in batches of other sizes.

    Args:
        problem: the problem.
        sizes: rows of each batch; the last one is repeated until there are no rows left.

    Raises:
        NotApplicable: the samples of a batch influence each other, or the batches cannot be put together.
    """
    if problem.model.batch_statistics or problem.draws.mode == "frozen":
        raise NotApplicable("the matrix depends on which samples share a batch")
    samples = list(problem.data.read(problem.device, order_matters=True))
    flat = [trees.flatten(sample.batch) for sample in samples]
    columns = list(zip(*(leaves for leaves, _ in flat)))
    form = flat[0][1]
    pieces: list[list[Any]] = []
    start, total, queue = 0, sum(sample.rows for sample in samples), list(sizes)
    joined = [_joined(column, [sample.rows for sample in samples]) for column in columns]
    while start < total:
        size = queue.pop(0) if len(queue) > 1 else queue[0]
        pieces.append([leaf[start : start + size] for leaf in joined])
        start += size
    twin = variant(problem)
    twin.data = problem.data.like([trees.unflatten(form, piece) for piece in pieces])
    return twin


def among(problem: Problem, group: Any, cut: int) -> Problem:
    """The problem as the first of two processes has it, with the batches before the cut, or the other with those from it on.

    Args:
        problem: with a list of batches; of one process.
        group: the process group.
        cut: a number of batches.
    """
    _ = problem.totals  # before there are others to count with
    exchange = make_group(group, problem.device, problem.lock)
    part = slice(cut, None) if exchange.rank else slice(cut)
    twin = problem.with_data(problem.data.source[part])
    twin.group = make_group(group, twin.device, twin.lock)
    join(twin, twin.loss)
    return twin


def _joined(leaves: Sequence[Any], rows: Sequence[int]) -> Tensor:
    if not all(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == n for leaf, n in zip(leaves, rows, strict=True)):
        raise NotApplicable("the batches hold something other than tensors with a row for every sample")
    try:
        return torch.cat(list(leaves))
    except RuntimeError as error:
        raise NotApplicable(f"the batches cannot be put together ({error})") from error


def in_dtype(problem: Problem, dtype: torch.dtype) -> Problem:
    """A deep copy with parameters, buffers and data in another precision.

    Raises:
        NotApplicable: the data are a loader, whose batches cannot be cast.
    """
    if not problem.data.fixed:
        raise NotApplicable("the data are a loader; give a list of batches to have them cast")

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    _ = problem.totals
    twin = copy.deepcopy(problem)
    for _, owner, key in twin.model.slots():
        with torch.no_grad():
            owner[key].data = cast(owner[key].data)
    twin.model.forms = Forms(twin.model.chosen)
    twin.layout = Layout(twin.model.chosen)
    twin.dtype = twin.layout.dtype
    source = [trees.tensor_map(cast, batch) for batch in problem.data.source]
    twin.data = problem.data.like(source)
    return twin


def counted(problem: Problem, **options: Any) -> tuple[Problem, Callable[[], int]]:
    """A twin, and a function that gives how often its model has been called."""
    twin = variant(problem, **options)
    twin.model = copy.copy(problem.model)
    rule, calls = problem.model.rule or call_model, [0]

    def call(model: Any, batch: Any) -> Any:
        calls[0] += 1
        return rule(model, batch)

    twin.model.rule = call
    return twin, lambda: calls[0]


def jacobian(problem: Problem) -> Tensor:
    """The Jacobian of all outputs (M x D), rows in the order of the data; by reverse mode, without any operator."""
    rows: list[Tensor] = []
    snapshot = problem.snapshot()
    with problem.differentiating():
        for evaluation in problem.evaluations(snapshot):
            z, leaves, _ = evaluation.record()
            units = torch.eye(z.numel(), dtype=z.dtype, device=z.device).reshape(-1, *z.shape)
            found = backward([z], leaves, [units], batched=True)
            parts = [
                leaf.new_zeros(len(units), leaf.numel()) if g is None else g.reshape(len(units), -1)
                for g, leaf in zip(found, leaves, strict=True)
            ]
            rows.append(torch.cat(parts, 1).to(problem.dtype))
    return torch.cat(rows)


@contextmanager
def batches(problem: Problem) -> Iterator[list[Batch]]:
    """All batches as terms see them, where products are taken."""
    with problem.batches() as every:
        found = list(every)
        for batch in found:
            batch.evaluate_loss()
        yield found

"""The kernel between the outputs on two data sets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from curvalg import Batch, LayerRecord, Problem, ProblemError

WIDTH = 32
"""Outputs of every row that are taken through the network at a time."""
Piece: TypeAlias = tuple[tuple[int, int], list[LayerRecord]]
"""The numbers of a process and of its batch, and the records of some outputs of every row of that."""


def cross_kernel(left: Problem, right: Problem) -> Tensor:
    """The empirical neural tangent kernel J₁ J₂ᵀ between the outputs on two data sets, shape (M₁, M₂).

    From layer inputs and output deltas, without a product: K[n C + c, m C + d] = ⟨∇f_c(x_n), ∇f_d(x'_m)⟩. The layers of
    the left data are recorded once, those of the right ones once for every batch (and 32 outputs) of the left. Kernel
    regression predicts ``cross_kernel(test, train) @ (inverse(ntk + c * Identity).lower(train) @ residuals)``. Jacot et al.,
    arXiv 1806.07572.

    Args:
        left: for example the test data; ``loss=None`` is enough. Of processes that share the right problem each has all of
            these data, or its part of a problem with ``group=``.
        right: for example the training data, with the same model and the same parameters.

    Raises:
        ProblemError: the problems do not have the same parameters, or their models compute different functions; samples
            influence each other.

    >>> import torch
    >>> from curvalg import Problem, registry
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> train, test = Problem(net, None, torch.randn(5, 3)), Problem(net, None, torch.randn(2, 3))
    >>> K = cross_kernel(test, train)
    >>> J = registry.build("jacobian")
    >>> K.shape, torch.allclose(K, J.lower(test).to_dense() @ J.lower(train).to_dense().T, atol=1e-5)
    (torch.Size([4, 10]), True)
    """
    _require_same(left, right)
    if right.group.alone:
        with left.group.together("cross_kernel"):
            rows = _rows(_pieces(left), right)
            return left.group.rows(torch.cat(rows) if rows else None)
    with right.group.together("cross_kernel"):
        rows = _rows(_same_pieces(left, right) if left.group.alone else _all_pieces(left, right), right)
        return right.group.rows(torch.cat(rows), 1)


def _rows(pieces: Iterator[Piece], right: Problem) -> list[Tensor]:
    """Rows of the kernel with the outputs of the right data that this process has, by batches of the left ones."""
    rows = []
    for _, batch in itertools.groupby(pieces, lambda piece: piece[0]):
        whole = torch.cat([_against(records, right) for _, records in batch])
        rows.append(whole.transpose(0, 1).flatten(0, 1))  # (c, n, M₂): the outputs of a row one after the other
    return rows


def _pieces(problem: Problem) -> Iterator[Piece]:
    """The records of the batches of this process."""
    with problem.batches() as batches:
        for number, batch in enumerate(batches):
            for records in _records(batch):
                yield (problem.group.rank, number), records


def _same_pieces(left: Problem, right: Problem) -> Iterator[Piece]:
    """The records of data that all processes have whole, compared among them."""
    with left.batches() as batches:
        for number, batch in enumerate(batches):
            right.group.alike("data on the left", batch.output)
            for records in _records(batch):
                yield (0, number), records
    right.group.alike("data on the left", None)


def _all_pieces(left: Problem, right: Problem) -> Iterator[Piece]:
    """The records of the batches of all processes on each of them, of one process after the other."""
    _ = left.num_samples, right.num_samples  # known to all before one of them reads a batch
    group = right.group
    for rank in range(group.size):
        pieces = _pieces(left) if rank == group.rank else iter(())
        while (piece := group.of(rank, next(pieces, None))) is not None:
            yield piece


def _against(records: list[LayerRecord], right: Problem) -> Tensor:
    """Inner products (K, n, M₂) of recorded gradients with those of the outputs of the right data that this process has."""
    first = records[0]
    found = [torch.zeros(first.columns, first.rows, 0, dtype=right.dtype, device=right.device)]
    with right.batches() as batches:
        for batch in batches:
            parts = [_products(records, others) for others in _records(batch)]
            found.append(torch.cat(parts, 2).transpose(2, 3).flatten(2))
    return torch.cat(found, 2)


def _products(records: list[LayerRecord], others: list[LayerRecord]) -> Tensor:
    """Inner products ⟨gₖₙ, g'ₖ'ₙ'⟩, shape (K, n, K', n')."""
    matched = {record.params: record for record in others}
    if matched.keys() != {record.params for record in records}:
        # A layer that the output depends on for one of the data sets only.
        return torch.einsum("knd,lmd->knlm", _explicit(records), _explicit(others))
    total: Tensor | None = None
    for record in records:
        part = record.gram(matched[record.params])
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _explicit(records: list[LayerRecord]) -> Tensor:
    """The multiplied-out gradients (K, n, D)."""
    gradients = {name: g.flatten(2) for record in records for name, g in record.explicit().items()}
    return torch.cat([gradients[name] for name in sorted(gradients)], 2)


def _records(batch: Batch) -> Iterator[list[LayerRecord]]:
    """The layers of a batch, some outputs at a time."""
    z = batch.output
    numbers = math.prod(z.shape[1:])
    units = torch.eye(numbers, dtype=z.dtype, device=z.device).reshape(numbers, 1, *z.shape[1:])
    for at in range(0, numbers, WIDTH):
        some = units[at : at + WIDTH]
        yield list(batch.layers(some.expand(len(some), *z.shape)))


def _require_same(left: Problem, right: Problem) -> None:
    for problem in (left, right):
        if not isinstance(problem, Problem):
            raise ProblemError(
                f"a kernel is between the outputs of two problems, got {type(problem).__name__}; write "
                "Problem(model, None, inputs)"
            )
    if any(problem.layout.whole is not problem.layout for problem in (left, right)):
        raise ProblemError(
            "cross_kernel needs the layers of a model whole, but the parameters of a problem are sharded; make the Problem of "
            "a whole model on every process (group= without shard=)"
        )
    if len({(p.group.rank, p.group.size) for p in (left, right) if not p.group.alone}) > 1:
        raise ProblemError("a kernel is between problems of the same processes; give both one group=")
    names, others = left.layout.names, right.layout.names
    if list(names) != list(others):
        different = sorted(set(names).symmetric_difference(others)) or list(names)
        raise ProblemError(f"a kernel is between outputs of one model, but the parameters differ in {different[:5]}")
    if (left.device, left.dtype) != (right.device, right.dtype):
        raise ProblemError(
            f"a kernel is between outputs of one model, but one is {left.dtype} on {left.device}, the other {right.dtype} on "
            f"{right.device}"
        )
    snapshots = left.snapshot(), right.snapshot()
    for name in names:
        a, b = (snapshot.state[name] for snapshot in snapshots)
        if a.shape != b.shape or not torch.equal(a, b):
            raise ProblemError(f"a kernel is between outputs of one model, but the values of {name!r} differ")
    right.require_same_function(left, "cross_kernel: outputs")

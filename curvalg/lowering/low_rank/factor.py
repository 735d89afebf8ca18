"""The columns V of Gauss-Newton forms A = V Vᵀ, held as layer inputs and output deltas instead of D × M numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from weakref import WeakSet

import torch
from torch import Tensor

from curvalg.errors import ExpressionError
from curvalg.expr.term import Term
from curvalg.lowering.low_rank.adjoint_check import AdjointCheck
from curvalg.lowering.sweeps.contract import call
from curvalg.problem import Batch, Layout, Problem, Snapshot
from curvalg.problem.layers.recorded import RecordedLayers, record_layers
from curvalg.problem.model.layer_record import LayerRecord, bytes_of
from curvalg.tensors import trees
from curvalg.tensors.batch_sums import BatchSum

Groups = tuple[tuple[str, ...], ...]
"""Disjoint groups of parameter names."""


SMALL = 2**24
"""Bytes of V up to which it may be multiplied out: beyond, reading it takes as long as the layers do."""


SPARE = 4
"""How many times the bytes of the gradients at the outputs of layers must fit for those of records not to be looked at: records
hold inputs as well, and copies."""


@dataclass(frozen=True)
class Chunk:
    """Some columns of V, from one batch.

    Args:
        start: number of its first column among all M.
        columns: how many per row.
        rows: of the batch.
        records: the layers.
    """

    start: int
    columns: int
    rows: int
    records: list[LayerRecord]
    _splits: dict[Groups, list[tuple[LayerRecord, dict[str, int]]]] = field(default_factory=dict, compare=False)

    @property
    def stop(self) -> int:
        """The number after that of its last column."""
        return self.start + self.columns * self.rows

    @property
    def nbytes(self) -> int:
        """The memory of inputs and deltas."""
        return sum(record.nbytes for record in self.records)

    def gram(self, other: Chunk) -> Tensor:
        """The products of these columns with others, (columns here, columns there)."""
        block: Tensor | None = None
        others = {record.params: record for record in other.records}
        for record in self.records:
            part = record.gram(others[record.params])
            block = part if block is None else block.add_(part)
        assert block is not None
        return block.reshape(self.stop - self.start, other.stop - other.start)

    def split(self, groups: Groups) -> list[tuple[LayerRecord, dict[str, int]]]:
        """The records of each layer by group, with the number of the group of each parameter."""
        if groups not in self._splits:
            owner = {name: g for g, names in enumerate(groups) for name in names}
            parts = [record.select(tuple(owner)) for record in self.records]
            self._splits[groups] = [(part, {n: owner[n] for n in part.params}) for part in parts if part is not None]
        return self._splits[groups]


class Factor:
    """The columns V (D × M) with Σ_t V_t V_tᵀ = Σ_t A_t over some terms, at one snapshot.

    Column (k, n) of a batch is Jₙᵀ sₖₙ; columns lie batch by batch, within a batch k by k. What fits the problem's budget is
    kept; other products push and pull the vectors through the model, and the Gram matrix is made group by group.

    Args:
        problem: whose budget decides; not held.
        terms: each with a factor.
    """

    def __init__(self, problem: Problem, terms: tuple[Term, ...]) -> None:
        self.terms = terms
        self.device, self.dtype = problem.device, problem.dtype
        self._sum_dtype = problem.accumulate
        self.nbytes = 0
        self.chunks: list[Chunk] = []
        self.complete = False
        self._sizes: list[tuple[int, int]] | None = None
        self._owner: list[Tensor] = []
        self._active: list[Tensor] = []
        self._gram: Tensor | None = None
        self._matrix: Tensor | None = None
        self.refused: int | None = None  # the budget that did not suffice
        self.check: AdjointCheck | None = None
        """What the columns are compared with, where that was asked for before they were recorded."""
        self._sharing: WeakSet[Factor] = WeakSet()
        """Factors over some of the parameters, which share inputs and deltas."""

    # -- what the columns are -------------------------------------------------------------------------------------------

    def cotangents(self, batch: Batch) -> Tensor:
        """The cotangents s of all terms, shape (columns, *output.shape)."""
        parts = []
        for term in self.terms:
            columns = call(term, "factor", batch)
            if columns is None or columns.shape[1:] != batch.output.shape:
                raise ExpressionError(
                    f"{term.label}.factor must return a tensor of shape (columns, {', '.join(map(str, batch.output.shape))}), "
                    f"got {trees.describe(columns)}"
                )
            parts.append(columns)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _note(self, batch: Batch) -> None:
        """Remember which term each column is of, and which columns are not zero."""
        parts = (
            [call(term, "factor", batch) for term in self.terms] if len(self.terms) > 1 else [self.cotangents(batch)]
        )
        for number, columns in enumerate(parts):
            assert columns is not None
            flat = columns.reshape(columns.shape[0], columns.shape[1], math.prod(columns.shape[2:]))
            self._active.append((flat != 0).any(2).reshape(-1))
            self._owner.append(torch.full((flat.shape[0] * flat.shape[1],), number, device=self.device))

    @property
    def owner(self) -> Tensor:
        """The number of the term that each column belongs to (M,)."""
        return torch.cat(self._owner) if self._owner else torch.zeros(0, dtype=torch.int64, device=self.device)

    @property
    def active(self) -> Tensor:
        """The columns that are not zero (M,): a sample of no share has none."""
        return torch.cat(self._active) if self._active else torch.zeros(0, dtype=torch.bool, device=self.device)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Pairs (columns per row, rows) of every batch; known after :meth:`prepare`."""
        assert self._sizes is not None
        return self._sizes

    @property
    def size(self) -> int:
        """The number M of columns; known after :meth:`prepare`."""
        return sum(columns * rows for columns, rows in self.sizes)

    # -- passes over the data ---------------------------------------------------------------------------------------------

    def drop(self) -> None:
        """Release inputs and deltas and V (not the Gram matrix)."""
        for other in self._sharing:
            other.drop()
        self._sharing.clear()
        self.chunks, self.nbytes, self.complete = [], 0, False
        self._matrix = self.check = None

    def share(self, source: Factor, problem: Problem) -> None:
        """Take inputs and deltas of a factor over all parameters, where it keeps them."""
        if not source.complete:
            return
        names = tuple(problem.layout.names)
        for chunk in source.chunks:
            parts = [part for record in chunk.records if (part := record.select(names)) is not None]
            self.chunks.append(Chunk(chunk.start, chunk.columns, chunk.rows, parts))
        self._sizes, self._owner, self._active = source._sizes, source._owner, source._active
        self.complete = True
        source._sharing.add(self)

    @property
    def kept_matrix(self) -> Tensor | None:
        """The matrix Vᵀ, where it was made and is kept."""
        return self._matrix

    def drop_matrix(self) -> None:
        """Release the matrix V alone."""
        if self._matrix is not None:
            self.nbytes -= bytes_of(self._matrix)
            self._matrix = None

    def matrix(self, problem: Problem, snapshot: Snapshot) -> Tensor | None:
        """The matrix Vᵀ (M, D), made once and kept; None where it is large or beyond the budget."""
        self.prepare(problem, snapshot)
        if self._matrix is None and self.complete:
            nbytes = self.size * problem.size * self.dtype.itemsize
            if nbytes <= SMALL and problem.budget.reserve(self, nbytes):
                self._matrix = torch.zeros(self.size, problem.size, dtype=self.dtype, device=self.device)
                for chunk in self.chunks:
                    rows = self._matrix[chunk.start : chunk.stop]
                    for record in chunk.records:
                        for name, gradients in record.explicit().items():
                            rows[:, problem.layout.slices[name]] = gradients.reshape(rows.shape[0], -1)
        return self._matrix

    def check_columns(self, layout: Layout) -> None:
        """Compare the columns with gradients, if they are still to be recorded."""
        if not self.complete and self.check is None:
            self.check = AdjointCheck(layout, self.device)

    def prepare(self, problem: Problem, snapshot: Snapshot) -> None:
        """Count the columns; keep inputs and deltas if they fit."""
        limit = problem.budget.limit
        if self._sizes is None or not (self.complete or limit in (0, self.refused)):
            for _ in self.walk(problem, snapshot, 0):
                pass
        problem.budget.touch(self)

    def walk(self, problem: Problem, snapshot: Snapshot, start: int = 0) -> Iterator[Chunk]:
        """All chunks from a column on, kept ones as they are; the first pass keeps what fits."""
        if self.complete:
            problem.budget.touch(self)
            yield from (chunk for chunk in self.chunks if chunk.stop > start)
            return
        first, at = self._sizes is None, 0
        keeping = start == 0 and problem.budget.limit > 0
        sizes: list[tuple[int, int]] = []
        check = self.check if keeping else None
        self.drop()
        self.check = check
        for evaluation in problem.evaluations(snapshot, order_matters=True):
            number = len(sizes)
            if self._sizes is not None and at + math.prod(self._sizes[number]) <= start:
                sizes.append(self._sizes[number])
                at += math.prod(sizes[-1])
                continue
            recorded = record_layers(evaluation)
            if first:
                self._note(recorded.batch)
            columns, rows = self.cotangents(recorded.batch), recorded.batch.output.shape[0]
            if self.check is not None:
                self.check.add(recorded, columns)
            sizes.append((columns.shape[0], rows))
            for k, records in _slices(recorded, columns, _half(problem)):
                chunk = Chunk(at + k * rows, records[0].columns, rows, records)
                if keeping:
                    keeping = problem.budget.reserve(self, chunk.nbytes)
                    self.chunks.append(chunk)
                    if not keeping:
                        self.refused = problem.budget.limit
                        self.drop()
                yield chunk
            at += math.prod(sizes[-1])
        self._sizes = sizes
        self.complete = keeping
        if not keeping:
            self.check = None
        if keeping:
            self.refused = None

    # -- products ---------------------------------------------------------------------------------------------------------

    def push(self, problem: Problem, snapshot: Snapshot, x: Tensor) -> Tensor:
        """Products Vᵀ X for X (D, P), shape (M, P)."""
        self.prepare(problem, snapshot)
        if not self.complete:
            return torch.stack([self._push_through(problem, snapshot, column) for column in x.unbind(1)], 1)
        return self.push_groups(problem.layout, (tuple(problem.layout.names),), x)[0]

    def push_groups(self, layout: Layout, groups: Groups, x: Tensor) -> Tensor:
        """Products V_gᵀ X_g for the rows of each group of parameters, shape (groups, M, P), from kept inputs and deltas."""
        directions = layout.unflatten_rows(x.T.contiguous())
        result = x.new_zeros(len(groups), self.size, x.shape[1])
        for chunk in self.chunks:
            for record, owner in chunk.split(groups):
                one = set(owner.values())
                parts = [(one.pop(), record.project(directions))] if len(one) == 1 else None
                for group, inner in parts or ((owner[n], t) for n, t in record.project_each(directions).items()):
                    result[group, chunk.start : chunk.stop] += inner.reshape(x.shape[1], -1).T
        return result

    def _push_through(self, problem: Problem, snapshot: Snapshot, x: Tensor) -> Tensor:
        parts = []
        for evaluation in problem.evaluations(snapshot, order_matters=True):
            batch, tangent = evaluation.push(x)
            columns = self.cotangents(batch)
            products = columns * tangent
            parts.append(products.reshape(*columns.shape[:2], -1).sum(2).reshape(-1))
        return torch.cat(parts).to(x.dtype) if parts else x.new_zeros(0)

    def pull(self, problem: Problem, snapshot: Snapshot, y: Tensor) -> Tensor:
        """Products V Y for Y (M, P), shape (D, P)."""
        self.prepare(problem, snapshot)
        if not self.complete:
            return torch.stack([self._pull_through(problem, snapshot, column) for column in y.unbind(1)], 1)
        return self.pull_groups(problem.layout, (tuple(problem.layout.names),), y[None])

    def pull_groups(self, layout: Layout, groups: Groups, y: Tensor) -> Tensor:
        """Products V_g Y_g for each group, together (D, P), from kept inputs and deltas; Y (groups, M, P)."""
        columns = y.shape[2]
        found = {name: BatchSum(self._sum_dtype) for name in layout.names}
        for chunk in self.chunks:
            weights = y[:, chunk.start : chunk.stop].mT.reshape(len(groups), columns, chunk.columns, chunk.rows)
            for record, owner in chunk.split(groups):
                one = set(owner.values())
                if len(one) == 1:
                    values = record.combine(weights[one.pop()])
                else:
                    values = record.combine_each({name: weights[group] for name, group in owner.items()})
                for name, value in values.items():
                    found[name].add(value)
        parts = [
            y.new_zeros(columns, size) if (value := found[name].value) is None else value.reshape(columns, -1)
            for name, size in zip(layout.names, layout.sizes, strict=True)
        ]
        return torch.cat(parts, 1).T

    def _pull_through(self, problem: Problem, snapshot: Snapshot, y: Tensor) -> Tensor:
        total, at = problem.sum(), 0
        for evaluation in problem.evaluations(snapshot, order_matters=True):
            batch = evaluation.evaluate()
            columns = self.cotangents(batch)
            count = math.prod(columns.shape[:2])
            weights = y[at : at + count].reshape(*columns.shape[:2], *[1] * (columns.ndim - 2))
            total.add(batch.vjp((weights.to(columns.dtype) * columns).sum(0)))
            at += count
        return y.new_zeros(problem.size) if total.value is None else total.value

    def gram(self, problem: Problem, snapshot: Snapshot) -> Tensor:
        """The Gram matrix Vᵀ V (M, M), computed once and kept.

        Where not all inputs and deltas fit, as many columns as do are held while one pass makes their products with all
        later ones.
        """
        if self._gram is not None:
            return self._gram
        self.prepare(problem, snapshot)
        size, limit = self.size, _half(problem)
        gram = torch.empty(size, size, dtype=self.dtype, device=self.device)
        start = 0
        while start < size:
            held: list[Chunk] = []
            used, full, stop = 0, False, start
            for chunk in self.walk(problem, snapshot, start):
                if chunk.start < start:
                    continue
                for other in held:
                    _fill(gram, other, chunk)
                full = full or bool(held and used + chunk.nbytes > limit and not self.complete)
                if not full:
                    _fill(gram, chunk, chunk)
                    held.append(chunk)
                    used, stop = used + chunk.nbytes, chunk.stop
            start = stop
        self._gram = gram
        return gram

    def squares(self, problem: Problem, snapshot: Snapshot, weights: dict[Term, float]) -> Tensor:
        """The diagonal of Σ_t c_t V_t V_tᵀ (D,), of terms that are not centred; c may have any sign."""
        self.prepare(problem, snapshot)
        layout = problem.layout
        dtype = self._sum_dtype or self.dtype
        total = torch.zeros(layout.size, dtype=dtype, device=self.device)
        for evaluation in problem.evaluations(snapshot, order_matters=True):
            recorded = record_layers(evaluation)
            for term in self.terms:
                columns = term.factor(recorded.batch)
                assert columns is not None
                for _, records in _slices(recorded, columns, _half(problem)):
                    for record in records:
                        for name, value in record.squares().items():
                            total[layout.slices[name]] += weights[term] * value.reshape(-1)
        return total.to(self.dtype)


def _half(problem: Problem) -> int:
    """The bytes of inputs and deltas that may be held while a Gram matrix is made, for each of its two sides."""
    return problem.workspace // 2


def _slices(recorded: RecordedLayers, columns: Tensor, limit: int) -> Iterator[tuple[int, list[LayerRecord]]]:
    """Records of as many columns at a time as fit the limit."""
    count = columns.shape[0]
    width = count
    if count > 1 and SPARE * count * recorded.most_bytes() > limit:
        # The bytes of one column give those of all: inputs are shared, deltas are not.
        one = recorded.records(columns[:1])
        deltas = sum(record.nbytes - record.input_bytes for record in one)
        shared = sum(record.input_bytes for record in one)
        del one
        width = max(1, min(count, (limit - shared) // max(1, deltas)))
    for at in range(0, count, width):
        yield at, recorded.records(columns[at : at + width])


def _fill(gram: Tensor, left: Chunk, right: Chunk) -> None:
    """Fill in the blocks of two chunks, and their mirror image."""
    flat = left.gram(right)
    gram[left.start : left.stop, right.start : right.stop] = flat
    if left is not right:
        gram[right.start : right.stop, left.start : left.stop] = flat.T


def factor_of(problem: Problem, snapshot: Snapshot, terms: tuple[Term, ...]) -> Factor:
    """The factor of some terms, shared by all that ask for it."""
    key = terms, tuple(problem.layout.names)
    factor = problem.cached(snapshot).get("factor", key, lambda: Factor(problem, terms))
    whole = problem.whole
    if not factor.complete and whole is not None and ("factor", terms) in whole.shared and problem.data.ordered:
        source = factor_of(whole, snapshot, terms)
        source.prepare(whole, snapshot)
        factor.share(source, problem)
    return factor

"""Products of an operator with the gradients of queries, contracted with the gradients of training samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from curvalg.distributed.group import Group
from curvalg.errors import OptionError
from curvalg.estimate.attribution.rank_error import RankError
from curvalg.estimate.attribution.sample_gradients import (
    WIDTH,
    SampleGradients,
    first_records,
    in_order,
    sample_gradients,
    shared_records,
)
from curvalg.estimate.attribution.units.checked_units import checked_blocks, checked_units
from curvalg.estimate.attribution.units.eigen_unit import LayerSizes
from curvalg.estimate.attribution.units.factored_unit import FactoredProducts, FactoredUnit, root_sums
from curvalg.estimate.attribution.units.parameter_unit import Scores, by_layer
from curvalg.estimate.attribution.units.units import Units, is_whole
from curvalg.lowering import CurvatureOperator
from curvalg.problem import Problem, Snapshot
from curvalg.problem.model.layer_record import LayerRecord

By = Literal["total", "layer", "position"]


@dataclass(frozen=True)
class QueryGradients:
    """Gradients of some queries.

    Args:
        numbers: of the queries, in the order of their data (P,).
        gradients: in the coordinates of each unit (P, ...), or what is held of their products.
    """

    numbers: Tensor
    gradients: list[Any]

    def __len__(self) -> int:
        return len(self.numbers)

    def and_(self, other: QueryGradients) -> QueryGradients:
        """These and others."""
        pairs = zip(self.gradients, other.gradients, strict=True)
        both = [mine.and_(its) if isinstance(mine, FactoredProducts) else torch.cat([mine, its]) for mine, its in pairs]
        return QueryGradients(torch.cat([self.numbers, other.numbers]), both)


@dataclass(frozen=True)
class TrainingScores:
    """Scores of the samples of one batch of the training data.

    Args:
        start: number of the first of them, in the data of this process.
        by_layer: name of a layer -> (P, n) or (P, n, T).
        error: where products are approximations.
    """

    start: int
    by_layer: Scores
    error: RankError | None = None

    @property
    def count(self) -> int:
        """The number of samples."""
        return next(iter(self.by_layer.values())).shape[1]

    def shown(self, by: By) -> Tensor | Scores:
        """Scores of all layers together, (P, n) or (P, n, T); by layer where that is asked for, or numbers of positions T
        differ."""
        first, *others = self.by_layer.values()
        if by == "layer" or any(part.shape != first.shape for part in others):
            return self.by_layer
        return sum(others, first)


class Contraction:
    """The scores ⟨∇cₙ, A v⟩ of training samples for gradients v of queries.

    Args:
        op: A, an operator on all parameters of its problem.
        batch: queries at a time, at most.
        positions: whether scores are of the positions of each row.
        rank: of the factors that are held of each product; None: products are held as they are.
        group: the processes that share the training samples or the queries.
    """

    def __init__(
        self,
        op: CurvatureOperator,
        batch: int,
        positions: bool = False,
        rank: int | None = None,
        group: Group | None = None,
    ) -> None:
        self.op, self.batch, self.positions, self.rank = op, batch, positions, rank
        self._group = group or op.problem.group
        self._units: list[Any] | None = None
        self._norms: dict[int, Scores] = {}  # of training samples, by the first of a batch: the same for all queries

    def units(self, records: Sequence[LayerRecord] | None) -> list[Any]:
        """The units that the operator acts on, found by the first records; None on a process without data."""
        if self._units is None:
            records = shared_records(self._group, records)
            self._units = self._found(records) if self.rank is None else self._factored(records, self.rank)
        return self._units

    def _found(self, records: Sequence[LayerRecord]) -> Units:
        return checked_units(self.op, records, self._rotates)

    def _factored(self, records: Sequence[LayerRecord], rank: int) -> list[FactoredUnit]:
        blocks = checked_blocks(self.op, records, lambda sizes: sizes.of_inputs_and_deltas < 2 * sizes.of_gradients)
        if blocks is None:
            raise OptionError(
                f"query_rank= is for operators that act on layers by themselves (EKFAC, KFAC, diagonals, blocks of arrays), "
                f"but {self.op.expr} is no such matrix, or differs from its blocks by more than rounding: take "
                "inverse(registry.build('ekfac') + c * Identity), or leave query_rank out"
            )
        return [FactoredUnit(block, rank) for block in blocks]

    def _rotates(self, sizes: LayerSizes) -> bool:
        rows = self.op.problem.totals.rows + self.batch
        return rows * sizes.of_inputs_and_deltas < 2 * self.batch * sizes.of_gradients

    def queries(self, problem: Problem, snapshot: Snapshot) -> Iterator[QueryGradients]:
        """The gradients of the samples' own losses, s ∇c, of a problem: up to so many at a time as one batch takes."""
        held: QueryGradients | None = None
        for piece in self._all_pieces(problem, snapshot):
            if held is not None and len(held) + len(piece) > self.batch:
                yield held
                held = None
            held = piece if held is None else held.and_(piece)
        if held is not None:
            yield held

    def _all_pieces(self, problem: Problem, snapshot: Snapshot) -> Iterator[QueryGradients]:
        """The gradients of all queries, of one process after the other where they have parts of them."""
        batches = sample_gradients(problem, snapshot, problem.totals.scale)
        if self._group.alone:
            yield from self._pieces(batches)
        elif problem.group.alone:
            for piece in self._pieces(self._same(batches)):
                yield self._of_first(piece)
        else:
            yield from self._gathered(problem, snapshot, batches)

    def _same(self, batches: Iterator[SampleGradients]) -> Iterator[SampleGradients]:
        """Batches of queries that every process has whole, compared among them."""
        for samples in batches:
            self._group.alike("queries", samples.columns)
            yield samples
        self._group.alike("queries", None)

    def _of_first(self, piece: QueryGradients) -> QueryGradients:
        """The bits of one process, where all take part in a product: they have to multiply the same."""
        assert self._units is not None
        if self.rank is not None or not is_whole(self._units):
            return piece
        return QueryGradients(piece.numbers, self._group.first(piece.gradients))

    def _gathered(
        self, problem: Problem, snapshot: Snapshot, batches: Iterator[SampleGradients]
    ) -> Iterator[QueryGradients]:
        """Queries of which each process has a part."""
        _ = self.op.problem.totals  # known to all before one of them reads a batch
        self.units(first_records(problem, snapshot))
        before = 0
        for rank in range(self._group.size):
            pieces = self._pieces(batches) if rank == self._group.rank else iter(())
            count = 0
            while (piece := self._group.of(rank, next(pieces, None))) is not None:
                count += len(piece)
                yield QueryGradients(piece.numbers.cpu() + before, piece.gradients)
            before += count

    def _pieces(self, batches: Iterator[SampleGradients]) -> Iterator[QueryGradients]:
        for samples in batches:
            numbers = samples.start + torch.arange(samples.count, device="cpu").reshape(samples.rows, samples.each)
            for first, records in samples.parts(min(WIDTH, self.batch)):
                units, columns = self.units(records), records[0].columns
                views = [unit.view(records) for unit in units]
                width = max(1, self.batch // columns)
                for at in range(0, samples.rows, width):
                    some = slice(at, min(at + width, samples.rows))
                    yield QueryGradients(
                        numbers[some, first : first + columns].reshape(-1),
                        [unit.gather(view, some) for unit, view in zip(units, views, strict=True)],
                    )

    def products(self, queries: QueryGradients) -> list[Any]:
        """Products A v, in the coordinates of each unit."""
        assert self._units is not None
        return [unit.multiply(g) for unit, g in zip(self._units, queries.gradients, strict=True)]

    def scores(self, products: list[Any]) -> Iterator[TrainingScores]:
        """Inner products with the gradients of the training samples of this process, one batch of the data after the other."""
        assert self._units is not None
        discarded = self.discarded(products)
        for samples in sample_gradients(self.op.problem, self.op.snapshot):
            found: dict[str, list[Tensor]] = {}
            norms: dict[str, list[Tensor]] = {}
            known = discarded is None or samples.start in self._norms
            for _, records in samples.parts():
                views = [(unit, unit.view(records)) for unit in self._units]
                pairs = zip(views, products, strict=True)
                each = [unit.project(view, product, self.positions) for (unit, view), product in pairs]
                _append(found, by_layer(item for part in each for item in part.items()))
                if not known:
                    sizes = [unit.norms(view, self.positions) for unit, view in views]
                    _append(norms, root_sums(item for part in sizes for item in part.items()))
            if not known:
                self._norms[samples.start] = {
                    name: in_order([n[None] for n in parts])[0] for name, parts in norms.items()
                }
            error = None
            if discarded is not None:
                assert self.rank is not None
                error = RankError(self.rank, discarded, self._norms[samples.start])
            yield TrainingScores(samples.start, {layer: in_order(parts) for layer, parts in found.items()}, error)

    def discarded(self, products: list[Any]) -> Scores | None:
        """Norms of what is missing of products, by layer (P,); None where nothing is."""
        if self.rank is None:
            return None
        assert self._units is not None
        each = [unit.discarded(product) for unit, product in zip(self._units, products, strict=True)]
        return root_sums(item for part in each for item in part.items())


def _append(lists: dict[str, list[Tensor]], found: Scores) -> None:
    for name, numbers in found.items():
        lists.setdefault(name, []).append(numbers)

"""What a product takes, in numbers: of the model, of the data, and of the work on one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from curvalg.errors import OptionError


@dataclass(frozen=True)
class UnitSizes:
    """Parameters that are whole together.

    Args:
        tensors: (slices, numbers of a slice) of each parameter: processes get whole slices.
        itemsize: bytes of a number of the weights.
        summed: bytes of a number of gradients and vectors.
    """

    tensors: tuple[tuple[int, int], ...]
    itemsize: int = 4
    summed: int = 4

    @property
    def numbers(self) -> int:
        """The numbers of all its parameters."""
        return sum(slices * each for slices, each in self.tensors)

    def part(self, ranks: int) -> int:
        """The numbers that the process with the most has, of so many."""
        return sum(-(-slices // ranks) * each for slices, each in self.tensors)


@dataclass(frozen=True)
class StageWork:
    """What a stage of a product takes, with one batch.

    Args:
        flops: floating-point operations.
        gathers, scatters: how often each unit is gathered, and its gradients are summed and cut.
    """

    flops: float
    gathers: tuple[int, ...] = ()
    scatters: tuple[int, ...] = ()

    def __add__(self, other: StageWork) -> StageWork:
        return StageWork(
            self.flops + other.flops,
            _added(self.gathers, other.gathers),
            _added(self.scatters, other.scatters),
        )

    def times(self, count: int) -> StageWork:
        """So many of it."""
        return StageWork(
            self.flops * count, tuple(n * count for n in self.gathers), tuple(n * count for n in self.scatters)
        )


def _added(left: Sequence[int], right: Sequence[int]) -> tuple[int, ...]:
    if not left or not right:
        return tuple(left or right)
    return tuple(a + b for a, b in zip(left, right, strict=True))


NOTHING = StageWork(0.0)


@dataclass(frozen=True)
class PassWork:
    """One pass over the data, by its work with one batch.

    Args:
        record: work before the first column, which is saved where recordings are kept.
        first, further: work of the first column, and of each after it.
        nbytes: memory that the recording of one batch holds; 0: it is not known.
        reserved: what the budget counts for the recording, parameters that it shares among it; 0: as much.
        fresh: the pass where nothing is kept, if it is another one.
    """

    record: StageWork
    first: StageWork
    further: StageWork
    nbytes: int = 0
    reserved: int = 0
    fresh: PassWork | None = None

    def product(self, columns: int, *, kept: bool) -> StageWork:
        """The work of one product with one batch."""
        if self.fresh is not None and not kept:
            return self.fresh.product(columns, kept=False)
        work = self.first + self.further.times(columns - 1)
        return work if kept else self.record + work


@dataclass(frozen=True)
class Workload:
    """A product as numbers, from which :func:`~curvalg.planning.plan_run` makes a plan; nothing of it needs a model.

    Args:
        units: the parameters, by what is whole together.
        rows: samples of the whole data set.
        batch_rows: samples of a batch.
        passes: over the data, in one product.
        size: numbers of a vector; None: all parameters.
        buffers: bytes of what is no parameter, whole on every process.
        itemsize: bytes of a number of vectors.
        summed: bytes of a number in sums over processes.
        sums: exchanges of a product where every process has whole vectors.
        totals: exchanges of a few numbers between two passes of a product.
        budget: bytes that recordings may take which are kept between products.
        divisible: whether the parameters can lie in parts.
        dealt: (processes, batches of the one with the most), where that is known; otherwise they are dealt out evenly.
        notes: what was assumed.

    Raises:
        OptionError: a number that is out of its range.

    >>> units = (UnitSizes(((250_000, 1),)),) * 4
    >>> work = Workload.of_dense(units, rows=1000, batch_rows=10, positions=1)
    >>> work.size, f"{work.product(1, kept=False).flops:.2g}"  # 9 forwards of 2 D FLOPs a sample: a fresh Hessian product
    (1000000, '1.8e+08')
    """

    units: tuple[UnitSizes, ...]
    rows: int
    batch_rows: int
    passes: tuple[PassWork, ...]
    size: int = 0
    buffers: int = 0
    itemsize: int = 4
    summed: int = 4
    sums: int = 1
    totals: int = 0
    budget: float = 0.0
    divisible: bool = True
    dealt: tuple[int, int] | None = None
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.units or self.rows < 1 or self.batch_rows < 1:
            raise OptionError(
                f"expected parameters, and at least one sample and one in a batch, got {len(self.units)} units, {self.rows} "
                f"samples and {self.batch_rows} in a batch; pass units=, rows= and batch_rows="
            )
        if not self.size:
            object.__setattr__(self, "size", sum(unit.numbers for unit in self.units))

    @classmethod
    def of_dense(
        cls,
        units: Sequence[UnitSizes],
        *,
        rows: int,
        batch_rows: int,
        positions: int = 1,
        forwards: float = 9,
        nbytes: int = 0,
    ) -> Self:
        """The workload of a stack of dense layers, by counting: a forward takes F = 2 W FLOPs a position of W weights.

        A product takes a multiple of F: of the Hessian 9 F, of the GGN 6 F, from recordings that are kept 6 F and 4 F. Each
        unit is gathered at most five times, and its gradients are summed and cut twice.

        Args:
            units: the parameters, by what is whole together.
            rows: samples of the whole data set.
            batch_rows: samples of a batch.
            positions: that a sample has: the tokens of a text.
            forwards: FLOPs of a product, in forwards.
            nbytes: that the recording of one batch holds.

        Raises:
            OptionError: a number that is out of its range.
        """
        weights = sum(unit.numbers for unit in units)
        flops = forwards * 2 * weights * positions * batch_rows
        work = StageWork(flops, (5,) * len(units), (2,) * len(units))
        note = f"FLOPs by the formula {forwards:g} · 2 W · positions; gathers at most five a unit"
        one = PassWork(NOTHING, work, work, nbytes)
        return cls(tuple(units), rows, batch_rows, (one,), notes=(note,))

    def batches(self, ranks: int) -> int:
        """The batches of the process with the most."""
        if self.dealt is not None and self.dealt[0] == ranks:
            return self.dealt[1]
        return math.ceil(math.ceil(self.rows / self.batch_rows) / ranks)

    def keeps(self, ranks: int) -> bool:
        """Whether recordings of all batches of a process are kept, where every process has all parameters."""
        needed = [p.nbytes and (p.reserved or p.nbytes) for p in self.passes]
        return all(needed) and bool(needed) and sum(needed) * self.batches(ranks) <= self.budget

    def product(self, columns: int, *, kept: bool) -> StageWork:
        """The work of one product with one batch, in all passes."""
        return sum((p.product(columns, kept=kept) for p in self.passes), NOTHING)

    def part(self, ranks: int) -> int:
        """The numbers of a vector on the process with the most, of so many."""
        return min(self.size, sum(unit.part(ranks) for unit in self.units))

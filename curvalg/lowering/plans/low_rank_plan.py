"""Products of terms with few output directions, A = V Vᵀ: from kept layer inputs and deltas, or from V itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from curvalg.errors import ProblemError
from curvalg.expr.term import Term
from curvalg.lowering.low_rank.factor import Factor, Groups, factor_of
from curvalg.lowering.low_rank.weighted_factor import weighed
from curvalg.lowering.plans.plan import Plan
from curvalg.lowering.replayed import differs
from curvalg.problem import Problem, Snapshot
from curvalg.problem.batch import lazy
from curvalg.problem.kept.race import Candidate, Race
from curvalg.problem.kept.reads import Reads
from curvalg.tensors.clock import timed
from curvalg.tensors.random_numbers import normals

MOST_COLUMNS = 64
"""The most columns of a factor, for each row of the data, that a factored product is taken with."""
AT_A_TIME = 8
"""Columns of an operand that are taken together from layers: mixed deltas of many more no longer fit the caches."""
MEASURED = 8
"""The most columns of an operand that ways are measured on."""


Way = Callable[[Tensor], Tensor]
"""x (n, K) -> the product."""
Oath = Callable[[Tensor], tuple[float, str | None] | None]
"""x (n, K) -> seconds that the first way takes at least, and why others are wrong; None where there is no such check."""
FEW = 8
"""Output directions a row that take no longer to record than a few products take."""
WIDTHS = {False: "one column", True: "several columns"}


class Impossible(Exception):
    """A way cannot be taken; the message says why."""


class Ways:
    """The choice which way the products of one matrix take at one snapshot; it may differ for single and several columns.

    Args:
        problem: remembers what was chosen, for runs that go on later.
        subject: what the products are of.
        patience: columns that are multiplied in the first way before the others are tried, which costs as much.
    """

    def __init__(self, problem: Problem, subject: str, patience: int) -> None:
        self._measured = measured = problem.measured
        self.races: dict[bool, Race[str]] = {
            wide: Race(measured, measured.name("way", f"{subject}, {width}")) for wide, width in WIDTHS.items()
        }
        self._counted = measured.name("columns multiplied", subject)
        self.columns = int(measured.recalled.get(self._counted, 0))
        self._patience = patience
        self.notes: dict[bool, str] = {}
        """What was measured, for single columns and for several."""

    @property
    def declined(self) -> dict[str, str]:
        """The reasons why ways cannot be taken."""
        return {way: reason for race in self.races.values() for way, reason in race.declined.items()}

    @property
    def chosen(self) -> set[str]:
        """The ways that are taken, for one column and for several."""
        return {race.chosen for race in self.races.values() if race.chosen is not None}

    def forget(self) -> None:
        """Measure again: what made a way impossible has changed."""
        for race in self.races.values():
            race.forget()

    def count(self, columns: int) -> None:
        """Note that so many more columns are multiplied."""
        self.columns += columns
        self._measured.choices[self._counted] = self.columns

    def due(self, wide: bool, columns: Callable[[], int]) -> bool:
        """Whether it is worth to measure: by what was multiplied, and no more than is still to come.

        Args:
            wide: of products with several columns.
            columns: gives the output directions of each row, of which more take longer to record.
        """
        race = self.races[wide]
        if race.chosen is not None or race.of_an_earlier_run:
            return race.chosen is None
        coming = self._measured.expected.coming(self.columns)
        return coming > self._patience and coming > self._patience * columns() / FEW

    def choose(
        self, ways: Mapping[str, Way], x: Tensor, *, oath: Oath | None = None, insist: bool = False
    ) -> tuple[str, Tensor | None]:
        """The way of a product with columns (n, K), measured; and the product, if it was made.

        Args:
            ways: by name; the first is the reference: one whose product differs from it is not taken.
            x: the columns.
            oath: by which other ways are checked and the first is estimated, where it costs much more than they do.
            insist: take the first way only if no other can be taken.
        """
        wide = x.shape[1] > 1
        race = self.races[wide]
        comparison = _Comparison(ways, x[:, :MEASURED], self._measured.device, oath)
        race.run(comparison.candidates(), differs=comparison.differs, insist=insist)
        about = " at least" if comparison.estimated else ""
        measured = (
            f"{race.shown().replace(' ', about + ' ', 1)} a column" if race.seconds else f"{race.chosen}, the only one"
        )
        shown = f"{race.chosen}, as chosen before" if race.recalled else measured
        self.notes[wide] = f"{WIDTHS[wide]}: {shown}"
        assert race.chosen is not None
        return race.chosen, comparison.products.get(race.chosen) if x.shape[1] <= MEASURED else None


class _Comparison:
    """Products of one operand by several ways, which show whether they agree, and how long they take.

    Args:
        ways: by name; the first is the reference.
        x: the operand.
        device: where it is.
        oath: by which ways other than the first are checked; None: by the first.

    Attributes:
        products: by way, of those that were taken and agree; no product is made twice.
    """

    def __init__(self, ways: Mapping[str, Way], x: Tensor, device: torch.device, oath: Oath | None) -> None:
        self._ways, self._x, self._device, self._oath = ways, x, device, oath
        self._seconds: dict[str, float] = {}
        self.products: dict[str, Tensor] = {}
        self.estimated = False

    @lazy
    def _reference(self) -> Tensor:
        return self._take(next(iter(self._ways)))

    def _take(self, name: str) -> Tensor:
        self._seconds[name], product = timed(lambda: self._ways[name](self._x), self._device)
        self.products[name] = product
        return product

    def candidates(self) -> dict[str, Candidate]:
        """The ways for a race; the reference has been taken all the time, and a run shows how long it takes."""
        columns, first = self._x.shape[1], next(iter(self._ways))
        return {
            name: Candidate(
                partial(way, self._x),
                work=columns,
                warm=True,
                rounds=1 if name == first else 2,
                seconds=partial(self._seconds.get, name),
            )
            for name, way in self._ways.items()
        }

    def differs(self, name: str) -> str | None:
        """The reason why a way cannot be taken beside the first, or None."""
        try:
            got = self._take(name)
        except (Impossible, ProblemError) as error:
            return str(error)
        if self._oath is not None and (found := self._oath(self._x)) is not None:
            seconds, reason = found
            self._seconds[next(iter(self._ways))] = seconds
            self.estimated = True
            if reason is not None:
                del self.products[name]
            return reason
        if bool((got - self._reference).norm() <= torch.finfo(got.dtype).eps ** 0.5 * self._reference.norm()):
            return None
        del self.products[name]
        return "its product differs from the ordinary one"


class LowRankPlan(Plan):
    """A sum of terms with few output directions, whole or in diagonal blocks.

    Besides the ordinary way there are two: from kept layer inputs and output deltas a product costs two matrix products a
    layer, whatever the number of blocks; and where V is small it is multiplied out, and a product is Vᵀ and V.

    Args:
        problem: over the parameters of all these blocks.
        entries: (coefficient, term).
        groups: the parameters of each block.
        shifts: multiple of the identity in each block.
        otherwise: the plan in the ordinary way.
        patience: columns that are multiplied in the ordinary way before another is tried; of one block more where
            there are many output directions.
    """

    def __init__(
        self,
        problem: Problem,
        entries: Sequence[tuple[float, Term]],
        groups: Groups,
        shifts: Sequence[float],
        otherwise: Plan,
        patience: int,
    ) -> None:
        self.problem, self.entries, self.groups, self.shifts = problem, tuple(entries), groups, tuple(shifts)
        self.otherwise, self.patience = otherwise, 0 if problem.factored is True else patience

    @property
    def inner(self) -> tuple[Plan, ...]:
        return (self.otherwise,)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The terms, in the order of the columns of V."""
        return tuple(term for _, term in self.entries)

    def ways(self, snapshot: Snapshot) -> Ways:
        """The choice of ways, shared by all plans of this matrix."""

        def make() -> Ways:
            total = " + ".join(sorted(f"{c:g}*{term}" for c, term in self.entries))
            return Ways(self.problem, f"{total} by {len(self.groups)} groups", self.patience)

        return self.problem.cached(snapshot).get("ways", (self.entries, self.groups), make)

    def factor(self, snapshot: Snapshot) -> Factor:
        """The factor V, shared by all that need it."""
        return factor_of(self.problem, snapshot, self.terms)

    def prepare(self, snapshot: Snapshot) -> None:
        with snapshot.lock:
            self._prepare(snapshot)

    def _prepare(self, snapshot: Snapshot) -> None:
        chosen = self.ways(snapshot).races[False].chosen
        if chosen not in (None, ORDINARY):
            self.factor(snapshot).prepare(self.problem, snapshot)
        elif chosen == ORDINARY or self.patience:
            self.otherwise.prepare(snapshot)

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        with snapshot.lock:
            return self._apply(snapshot, x)

    def _apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        if not self.problem.totals.rows_here:  # the data are those of other processes
            return self._shifted(torch.zeros_like(x), x)
        problem, ways, candidates = self.problem, self.ways(snapshot), self._ways(snapshot)
        wide = x.shape[1] > 1
        ways.count(x.shape[1])
        if ways.declined and self.factor(snapshot).refused not in (None, problem.budget.limit):
            ways.forget()
        way = ways.races[wide].chosen
        blocks = len(self.groups) > 1
        if ways.due(wide, (lambda: FEW) if blocks else self._directions):
            oath = partial(self._oath, snapshot) if blocks else None
            if blocks:
                self.factor(snapshot).check_columns(problem.layout)
            way, product = ways.choose(candidates, x, oath=oath, insist=problem.factored is True)
            self._release(snapshot, ways.chosen)  # others have left something behind
            if product is not None:
                return product
        try:
            return candidates[way or ORDINARY](x)
        except Impossible:  # the budget has shrunk since
            return self.otherwise.apply(snapshot, x)

    def dense(self, snapshot: Snapshot) -> Tensor | None:
        """The matrix V T² Vᵀ by one product of V with itself, where V may be multiplied out and gives what products give."""
        with snapshot.lock:
            try:
                factor, vectors = self._explicit(snapshot)
            except Impossible:
                return None
            whole = vectors.T @ self._weigh(factor, vectors[None])[0]
            for names, shift in zip(self.groups, self.shifts, strict=True):
                for name in names:
                    whole.diagonal()[self.problem.layout.slices[name]] += shift
            if self.problem.verify and MULTIPLIED not in self.ways(snapshot).chosen:
                x = normals((len(whole), 1), 0).to(whole)
                if differs(whole @ x, self.otherwise.apply(snapshot, x)):
                    return None
            return whole

    def reads(self, snapshot: Snapshot, columns: int) -> Reads | str:
        way, factor = self.ways(snapshot).races[columns > 1].chosen, self.factor(snapshot)
        if way == FACTORED and factor.complete:
            return Reads(tuple(factor.chunks), (factor,))
        if way == MULTIPLIED and (matrix := factor.kept_matrix) is not None:
            return Reads((matrix,), (factor,))
        if way == ORDINARY:
            return self.otherwise.reads(snapshot, columns)
        return "since no way was chosen yet"

    def _release(self, snapshot: Snapshot, chosen: set[str]) -> None:
        """Drop what no chosen way needs."""
        if ORDINARY not in chosen:
            self.otherwise.release(snapshot)
        elif chosen == {ORDINARY}:
            self.factor(snapshot).drop()
        if MULTIPLIED not in chosen:
            self.factor(snapshot).drop_matrix()

    def _ways(self, snapshot: Snapshot) -> dict[str, Way]:
        return {
            ORDINARY: lambda x: self.otherwise.apply(snapshot, x),
            FACTORED: lambda x: self._factored(snapshot, x),
            MULTIPLIED: lambda x: self._multiplied(snapshot, x),
        }

    # -- from layer inputs and deltas -------------------------------------------------------------------------------------

    def _factored(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        factor, layout = self.factor(snapshot), self.problem.layout
        self._require_few()
        factor.prepare(self.problem, snapshot)
        if not factor.complete:
            raise Impossible("layer inputs and deltas do not fit the budget")

        def product(part: Tensor) -> Tensor:
            pushed = self._weigh(factor, factor.push_groups(layout, self.groups, part))
            return self._shifted(factor.pull_groups(layout, self.groups, pushed), part)

        parts = [product(part) for part in x.split(AT_A_TIME, 1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _oath(self, snapshot: Snapshot, x: Tensor) -> tuple[float, str | None] | None:
        """The seconds of two passes for each block, and why inputs and deltas are wrong; None where nothing was compared."""
        factor = self.factor(snapshot)
        if factor.check is None:
            return None
        seconds = 2 * len(self.groups) * factor.check.seconds * x.shape[1]
        push, pull = (partial(f, self.problem.layout, self.groups) for f in (factor.push_groups, factor.pull_groups))
        return seconds, factor.check.wrong(push, pull, len(self.groups))

    def _directions(self) -> int:
        """The output directions of each row of the data."""
        return sum(map(self.problem.factor_columns, self.terms))

    def _require_few(self) -> None:
        if (columns := self._directions()) > MOST_COLUMNS:
            raise Impossible(f"{columns} output directions for each row of the data, more than {MOST_COLUMNS}")

    def _weigh(self, factor: Factor, y: Tensor) -> Tensor:
        return weighed(factor, self.entries, self.problem.totals.count, y)

    def _shifted(self, result: Tensor, x: Tensor) -> Tensor:
        layout = self.problem.layout
        for names, shift in zip(self.groups, self.shifts, strict=True):
            if shift:
                for name in names:
                    result[layout.slices[name]].add_(x[layout.slices[name]], alpha=shift)
        return result

    # -- from V itself ------------------------------------------------------------------------------------------------------

    def _multiplied(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        factor, matrix = self._explicit(snapshot)
        pushed = self._weigh(factor, (matrix @ x)[None])[0]
        return self._shifted(matrix.T @ pushed, x)

    def _explicit(self, snapshot: Snapshot) -> tuple[Factor, Tensor]:
        """The factor, and Vᵀ (M, D) itself."""
        factor = self.factor(snapshot)
        if len(self.groups) > 1:
            raise Impossible("it is for the whole matrix, not for blocks")
        if self.problem.accumulate is not None:  # one kernel sums over all batches
            raise Impossible(f"sums over batches are asked for in {self.problem.accumulate}")
        self._require_few()
        matrix = factor.matrix(self.problem, snapshot)
        if matrix is None:
            raise Impossible("V is too large to be multiplied out")
        return factor, matrix

    # -- for people -----------------------------------------------------------------------------------------------------------

    def lines(self, snapshot: Snapshot) -> list[str]:
        ways, factor = self.ways(snapshot), self.factor(snapshot)
        measured = [f"  measured, {note}" for note in ways.notes.values()]
        measured += [f"  not {way}: {reason}" for way, reason in ways.declined.items()]
        chosen = ways.races[False].chosen or ways.races[True].chosen
        if chosen == ORDINARY or (
            chosen is None and (self.patience or self.problem.budget.limit in (0, factor.refused))
        ):
            return [*self.otherwise.lines(snapshot), *measured]
        total = " + ".join(str(term) if c == 1 else f"{c:g} * {term}" for c, term in self.entries)
        blocks = f"{len(self.groups)} diagonal blocks of " if len(self.groups) > 1 else ""
        return [f"{blocks}{total}, {chosen or FACTORED}", *_DETAILS[chosen or FACTORED](factor), *measured]


ORDINARY, FACTORED, MULTIPLIED = "ordinary", "factored", "multiplied out"


def _of_layers(factor: Factor) -> list[str]:
    kept = (
        f"kept: {factor.nbytes / 2**20:.3g} MiB" if factor.complete else "kept from the first product on, if they fit"
    )
    return ["  two matrix products a layer, for all blocks together", f"  layer inputs and output deltas {kept}"]


def _of_matrix(factor: Factor) -> list[str]:
    return [f"  V of {factor.size} columns is kept, {factor.nbytes / 2**20:.3g} MiB with what it was made of"]


_DETAILS: dict[str, Callable[[Factor], list[str]]] = {FACTORED: _of_layers, MULTIPLIED: _of_matrix}

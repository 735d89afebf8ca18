"""A sweep on a problem at a snapshot: recorded once, batch by batch, and multiplied many times.

What fits the problem's budget is kept between products; other batches are recorded, multiplied and dropped ("fresh").
Both give the same numbers, since both multiply the same recording.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from curvalg.errors import CurvalgError
from curvalg.expr.term import DatasetTerm
from curvalg.lowering.sweeps.chunked import ChunkedRecording
from curvalg.lowering.sweeps.contract import call
from curvalg.lowering.sweeps.keeping import WARM, Keeping
from curvalg.lowering.sweeps.programs import Programs
from curvalg.lowering.sweeps.recorder import Recorder, Recording
from curvalg.lowering.sweeps.recordings import SinglePass, Staged, TwoStage, graph_bytes
from curvalg.lowering.sweeps.routes import Routes
from curvalg.lowering.sweeps.sweep import Sweep, prepare
from curvalg.lowering.sweeps.tangents import ForwardAD, Linearized
from curvalg.lowering.sweeps.widths import Widths
from curvalg.problem import Batch, Problem, Snapshot
from curvalg.problem.data.batches import OrderError
from curvalg.problem.verification.tangent_checks import TangentNotes
from curvalg.problem.verification.verdicts import RouteError
from curvalg.tensors.batch_sums import BatchSum
from curvalg.tensors.columns import chunked, mapped


class Linearization:
    """One sweep on one problem at one snapshot.

    Args:
        problem: whose budget decides what is kept.
        sweep: the terms.
    """

    def __init__(self, problem: Problem, sweep: Sweep) -> None:
        self.sweep = sweep
        self.nbytes = 0
        self.batches: dict[int, Recording] = {}
        self.complete = False
        self.notes: dict[str, str] = {}
        """What was chosen and why, by topic."""
        self.worth = Keeping(problem, sweep, self.notes)
        self.limit = problem.budget.limit
        self.keeping = self._may_keep()
        self.recorder = Recorder(problem, sweep, self.notes, self.worth)
        self.routes = Routes(self.recorder)
        self.widths = Widths(problem, sweep, self.notes)
        self.programs = Programs(problem, sweep, self.notes)
        self._counted = problem.measured.name("products", sweep)
        self.products = int(problem.measured.recalled.get(self._counted, 0))
        self._sharing: WeakSet[Linearization] = WeakSet()
        """Linearisations over some of the parameters, which share these recordings."""
        self._shared = False
        self._ordered = problem.data.ordered
        self._single_pass = sweep.curved and not sweep.dataset_terms

    def _may_keep(self) -> bool:
        return self.limit > 0 and not self.worth.declined

    @property
    def route(self) -> str:
        """The route of tangents, where no term is curved."""
        return self.recorder.route

    def drop(self) -> None:
        """Release all recordings, and what others share of them; the next product makes them anew."""
        for other in self._sharing:
            other.drop()
        self._sharing.clear()
        self.batches.clear()
        self.nbytes, self.complete = 0, False

    def prepare(self, problem: Problem, snapshot: Snapshot) -> None:
        """Statistics and, within the budget, recordings of all batches."""
        self._prepared(problem, snapshot)
        if self.keeping:
            problem.budget.touch(self)
            for _ in self.recordings(problem, snapshot, 1):
                pass

    # -- products -------------------------------------------------------------------------------------------------------

    def product(self, problem: Problem, snapshot: Snapshot, rows: Tensor) -> Tensor:
        """The product of the sweep with vectors (K, D), shape (K, D)."""
        problem.budget.touch(self)
        before = self.products
        self.products += rows.shape[0]
        problem.measured.choices[self._counted] = self.products
        if not problem.totals.rows_here:  # the data are those of other processes
            return self._product(problem, snapshot, rows)
        if rows.shape[0] == 1 and not self.routes.tried and _due(problem, before, self.routes.after):
            self._try_routes(problem, snapshot)
        if not self.programs.tried and _due(problem, self.products - 1, self.programs.after):
            self._try_programs(problem, snapshot, rows[:1])
        return self._attempt(problem, snapshot, rows)

    def _attempt(self, problem: Problem, snapshot: Snapshot, rows: Tensor) -> Tensor:
        try:
            return self._product(problem, snapshot, rows)
        except OrderError:
            if not self._ordered or self.complete:
                raise
            # A sum over samples needs no order; but what is kept of some batches is of no use where the next pass gives others.
            self.drop()
            self._ordered = self.keeping = False
            self.notes["budget"] = "no batch kept: the loader gives the samples in another order each time"
            return self._product(problem, snapshot, rows)
        except CurvalgError as error:
            self._forget(problem)
            if not isinstance(error, RouteError) and not self._reroute(problem, error):
                raise
            return self._attempt(problem, snapshot, rows)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            # Most likely a term or an operation of the model that cannot be batched; if not, the loop raises it again.
            self._forget(problem)
            if rows.shape[0] == 1 or self.widths.asked == 1:
                if not self._reroute(problem, error):
                    raise
                return self._attempt(problem, snapshot, rows)
            self.widths.asked = 1
            result = self._product(problem, snapshot, rows)
            self.notes["columns"] = f"columns one after the other: {str(error).strip().splitlines()[0]}"
            return result
        except BaseException:  # an interruption must not leave half of a shuffled pass behind
            self._forget(problem)
            raise

    def _reroute(self, problem: Problem, error: Exception) -> bool:
        """Whether tangents are taken by another route from now on: this one failed on a batch unlike the first (an expert
        that the first gave no rows), where it was found right.
        """
        if self.sweep.curved or not any(words in str(error) for words in ("derivative", "forward AD")):
            return False
        failed = {ForwardAD.ROUTE: "no_forward_ad", TwoStage.ROUTE: "no_double_backward"}.get(self.route)
        of = problem.whole if self._shared and problem.whole is not None else problem
        notes = of.noted(TangentNotes)
        if failed is None or getattr(notes, failed) is not None:
            return False
        setattr(notes, failed, str(error).strip().splitlines()[0])
        if self._shared:
            linearization(of, of.snapshot(), self.sweep).drop()
        self.drop()
        self._shared = False
        self.recorder.measure_again()
        return True

    def _forget(self, problem: Problem) -> None:
        """Drop what an unfinished pass recorded where the next pass could not say which batch is which."""
        if not self.complete and not (problem.data.fixed and problem.data.ordered):
            self.drop()

    def _product(self, problem: Problem, snapshot: Snapshot, rows: Tensor) -> Tensor:
        sweep = self.sweep
        timing = self.worth.open and len(rows) == 1 and self.products > WARM
        if self._single_pass:
            result = problem.sum()
            for single in self.recordings(problem, snapshot, rows.shape[0]):
                assert isinstance(single, (SinglePass, ChunkedRecording))
                chunk = 1 if len(rows) == 1 else self.widths.at_a_time(problem, single, rows)
                if timing and single.index in self.batches:
                    result.add(self.worth.multiplying(single.index, partial(single.multiply, rows, chunk)))
                else:
                    result.add(single.multiply(rows, chunk))
                del single  # a fresh graph is released before the next batch is recorded
            if timing:
                self._keep_if_worth(problem)
            return _value(result, rows)
        total = problem.sum()
        prepared = self._prepared(problem, snapshot)
        reduced = {term: problem.sum() for term in sweep.reduces}
        totals: dict[DatasetTerm, Any] = {}
        for term in sweep.projects:
            totals[term] = self._project(problem, term, rows, prepared)
        tangents: dict[int, Tensor] = {}
        if sweep.reduces:
            for recorded in self._staged(problem, snapshot, rows.shape[0], again=self._ordered):
                assert isinstance(recorded, Staged)
                tangent = tangents[recorded.index] = recorded.tangent(
                    rows, self.widths.at_a_time(problem, recorded, rows)
                )
                for term in sweep.reduces:
                    reduced[term].add(self._reduce(term, recorded, tangent, prepared))
                del recorded
            totals |= problem.totalled(reduced)
            if not (self._ordered or self.complete):  # the next pass gives other batches
                tangents.clear()
        for recorded in self._staged(problem, snapshot, rows.shape[0], again=bool(tangents)):
            chunk = self.widths.at_a_time(problem, recorded, rows)
            if isinstance(recorded, ChunkedRecording):
                total.add(recorded.multiply(rows, chunk))
                self.recorder.route = recorded.route
                del recorded
                continue
            known = tangents.pop(recorded.index, None)
            pushed = self._pushed(recorded, rows, chunk) if known is None else known
            rates = self._rates(recorded, pushed, prepared, totals)
            del known, pushed  # released before the last stage, which is the peak
            finish = partial(recorded.finish, rows, rates, chunk)
            del rates
            kept = timing and recorded.index in self.batches
            total.add(self.worth.multiplying(recorded.index, finish) if kept else finish())
            del finish
            del recorded
        return _value(total, rows)

    def _pushed(self, recorded: Staged, rows: Tensor, chunk: int) -> Tensor:
        """The tangents of a batch, timed where routes are still to be compared."""
        push = partial(recorded.tangent, rows, chunk)
        return self.routes.pushing(recorded, self.products, push) if len(rows) == 1 else push()

    def _prepared(self, problem: Problem, snapshot: Snapshot) -> dict[DatasetTerm, Any]:
        """Statistics of the terms, by the pass that records all batches if they are to be kept."""

        def batches() -> Iterator[Batch]:
            for recorded in self.recordings(problem, snapshot, 1):
                assert isinstance(recorded, Staged)
                yield recorded.batch
                del recorded

        whole = problem.data.ordered and not any(term.acts_on != "batch" for term in self.sweep.dataset_terms)
        recorded = batches if self.keeping and whole else None
        return prepare(self.sweep.dataset_terms, problem, snapshot, recorded)

    def _project(self, problem: Problem, term: DatasetTerm, rows: Tensor, prepared: dict[DatasetTerm, Any]) -> Any:
        if problem.group.sharded:  # it is linear in v: a sum over the numbers of v, of which each process has some
            rows = problem.layout.once(rows)
        found = chunked(
            lambda part: mapped(lambda v: call(term, "project", v, prepared[term]), part), self.widths.unmeasured, rows
        )
        return problem.group.vectors.sum(found) if problem.group.sharded else found

    def _reduce(self, term: DatasetTerm, recorded: Staged, tangent: Tensor, prepared: dict[DatasetTerm, Any]) -> Any:
        batch = recorded.batch
        batch.evaluate_loss()

        def reduce(part: Tensor) -> Any:
            return mapped(lambda t: batch.counted(call(term, "reduce", batch, t, prepared[term])), part)

        return chunked(reduce, self.widths.unmeasured, tangent)

    def _rates(
        self, recorded: Staged, tangent: Tensor, prepared: dict[DatasetTerm, Any], totals: dict[DatasetTerm, Any]
    ) -> Tensor:
        recorded.batch.evaluate_loss()
        terms, values = list(totals), list(totals.values())

        def rate(t: Tensor, given: list[Any]) -> Tensor:
            return self.sweep.rate(recorded.batch, t, prepared, dict(zip(terms, given, strict=True)))

        def rates(part: Tensor, given: list[Any]) -> Tensor:
            return mapped(rate, part, given)

        if not values:
            return chunked(lambda part: mapped(lambda t: rate(t, []), part), self.widths.unmeasured, tangent)
        return chunked(rates, self.widths.unmeasured, tangent, values)

    def _staged(
        self, problem: Problem, snapshot: Snapshot, columns: int, *, again: bool
    ) -> Iterator[Staged | ChunkedRecording]:
        """The recordings of a sweep that is not a single pass."""
        for recorded in self.recordings(problem, snapshot, columns, again=again):
            assert isinstance(recorded, (Staged, ChunkedRecording))
            yield recorded
            del recorded  # not held while the next is recorded

    # -- recordings -----------------------------------------------------------------------------------------------------

    def recordings(
        self, problem: Problem, snapshot: Snapshot, columns: int, *, again: bool = False
    ) -> Iterator[Recording]:
        """All batches, kept ones as they are, the others recorded now.

        Args:
            problem: the problem.
            snapshot: the state.
            columns: of the product they are for.
            again: whether the batches must come in the order of the pass before.
        """
        if not self.complete:
            self._share(problem, snapshot)
        if self.complete:
            yield from tuple(self.batches.values())
            return
        if self.limit != problem.budget.limit:
            self.limit = problem.budget.limit
            self.keeping = self._may_keep()
        for evaluation in problem.evaluations(snapshot, order_matters=again or bool(self.batches)):
            index = evaluation.sample.index
            recorded = self.batches.get(index)
            if recorded is None:
                recorded = self.recorder.record(evaluation, columns, self.keeping)
                self._keep(problem, recorded)
            yield recorded
            del recorded  # a fresh graph is released before the next is recorded
        self.complete = self.keeping

    def _keep_if_worth(self, problem: Problem) -> None:
        """Give up recordings that save next to nothing; not those of others, nor where only what is kept is a matrix."""
        if self._may_be_dropped(problem) and self.worth.decide():
            self._keep_no_more()

    def _may_be_dropped(self, problem: Problem) -> bool:
        shared = self._shared or self._sharing or ("sweep", self.sweep.key) in problem.shared
        return not shared and problem.data.ordered

    def _keep_no_more(self) -> None:
        self.drop()
        self.keeping = False

    def _share(self, problem: Problem, snapshot: Snapshot) -> None:
        """Take the recordings of the whole problem, where several blocks have the sweep in common and they are kept."""
        whole = problem.whole
        if whole is None or ("sweep", self.sweep.key) not in whole.shared or not self.keeping:
            return
        if self.sweep.dataset_terms:  # their statistics are of the parameters at hand
            return
        source = linearization(whole, snapshot, self.sweep)
        source.prepare(whole, snapshot)
        shared = {i: r.over(problem) for i, r in source.batches.items()} if source.complete else {}
        if shared and all(r is not None for r in shared.values()):
            self.batches, self.complete, self.recorder.route = shared, True, source.route  # type: ignore[assignment]
            self.widths.name = source.widths.name
            self.notes["recordings"], self._shared = "recordings shared by all blocks", True
            source._sharing.add(self)

    def _keep(self, problem: Problem, recorded: Recording) -> None:
        if not self.keeping:
            return
        nbytes = graph_bytes(recorded)
        if problem.budget.reserve(self, nbytes):
            self.batches[recorded.index] = recorded
            return
        self.keeping = recorded.keep = False
        if not self._ordered:  # which batch is which would be unknown in the next pass
            self.drop()
        kept = f"{len(self.batches)} batches kept" if self.batches else "no batch kept"
        needed, limit = nbytes / 2**20, problem.budget.limit / 2**20
        self.notes["budget"] = f"{kept}: one more needs {needed:.3g} MiB of a budget of {limit:.3g} MiB"

    def _own_recordings(self, problem: Problem) -> bool:
        """Whether there are recordings of all batches that others do not share, and of which another kind can be made."""
        if self.sweep.curved or not self.complete or not problem.data.ordered or self._shared:
            return False
        return not any(isinstance(recorded, ChunkedRecording) for recorded in self.batches.values())

    def _try_routes(self, problem: Problem, snapshot: Snapshot) -> None:
        if self._own_recordings(problem) and not self._sharing:
            worth = self.worth if self._may_be_dropped(problem) else None
            replaced = self.routes.replace(problem, snapshot, self.batches, worth)
            if replaced is not None:
                self.batches = replaced
            elif self.worth.declined:
                self._keep_no_more()

    def _try_programs(self, problem: Problem, snapshot: Snapshot, rows: Tensor) -> None:
        if self.programs.race.of_an_earlier_run:  # which had all recordings by now
            self.prepare(problem, snapshot)
        if not self._own_recordings(problem):
            return
        if (replaced := self.programs.replace(problem, snapshot, self.batches, rows)) is not None:
            self.batches, self.recorder.route = replaced, Linearized.ROUTE


def _value(total: BatchSum, rows: Tensor) -> Tensor:
    """The sum over the batches of this process, which may have none."""
    value: Tensor | None = total.value
    return torch.zeros_like(rows) if value is None else value


def _due(problem: Problem, made: int, after: int) -> bool:
    """Whether enough products were made to pay for a race, and as many are still to come."""
    return made >= after and problem.measured.expected.coming(made) >= after


def linearization(problem: Problem, snapshot: Snapshot, sweep: Sweep) -> Linearization:
    """The linearisation of a sweep, shared by all expressions that contain it."""
    return problem.cached(snapshot).get("linearization", sweep.key, lambda: Linearization(problem, sweep))

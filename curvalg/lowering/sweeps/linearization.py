"""A sweep on a problem at a snapshot: recorded once, batch by batch, and multiplied many times.

What fits the problem's budget is kept between products; other batches are recorded, multiplied and dropped ("fresh").
Both give the same numbers, since both multiply the same recording.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias
from weakref import WeakSet

import torch
from torch import Tensor

from curvalg.errors import CurvalgError
from curvalg.expr.term import DatasetTerm
from curvalg.lowering.race import LONG, fastest, timed
from curvalg.lowering.sweeps.chunked import ChunkedRecording, record_headed
from curvalg.lowering.sweeps.contract import call
from curvalg.lowering.sweeps.recordings import SinglePass, Staged, TwoStage, graph, graph_bytes
from curvalg.lowering.sweeps.sweep import Sweep, prepare
from curvalg.lowering.sweeps.tangents import ForwardAD, Linearized, Transient, decline_linearized
from curvalg.problem import Batch, Evaluation, Problem, Snapshot
from curvalg.problem.data.batches import OrderError
from curvalg.problem.evaluation import FORWARD_AD
from curvalg.problem.verification.oaths import RouteError, few_rows, swear_curvature, swear_symmetric, verdict
from curvalg.problem.verification.reverse import twice_backward
from curvalg.tensors.backward import backward
from curvalg.tensors.columns import chunked, mapped

Recording: TypeAlias = SinglePass | Staged | ChunkedRecording
MOST_COLUMNS = 64
"""The most columns in one batched backward pass."""
WIDTHS = (2, 4, 16, MOST_COLUMNS)
"""Columns in one batched backward pass that are tried, and the widths of operands from which each is."""
WORSE = 1.2
"""How many times the cost of a column alone says that batching does not pay."""
COLUMN_MEMORY = 2**30
"""Bytes that the intermediates of a batched backward pass may take, by estimate."""
AMORTISED = 32
"""Products after which a linearised program, which is expensive to record, may be tried."""


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
        self.limit = problem.budget.limit
        self.keeping = self.limit > 0
        self.route = "two backward passes"
        self.asked: int | None = None
        if problem.columns != "auto":
            self.asked = 1 if problem.columns == "loop" else problem.columns
        self._chunks: dict[int, int] = {}
        self.notes: dict[str, str] = {}
        """What was chosen and why, by topic."""
        self._named = {topic: problem.choice(topic, sweep) for topic in ("products", "tangents", "program", "columns")}
        self.products = int(problem.recalled.get(self._named["products"], 0))
        self._measured = self._tried = False
        self._composite = problem.model.composite
        self._sharing: WeakSet[Linearization] = WeakSet()
        """Linearisations over some of the parameters, which share these recordings."""
        self._shared = False
        self._ordered = problem.data.ordered
        self.races = True
        """Whether routes may be timed."""
        self._single_pass = sweep.curved and not sweep.dataset_terms

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
        """The product with vectors (K, D), shape (K, D)."""
        problem.budget.touch(self)
        self.products += rows.shape[0]
        problem.choices[self._named["products"]] = self.products
        if self.products > AMORTISED and not self._tried:
            if self._named["program"] in problem.recalled:  # of an earlier run, which had all recordings by now
                self.prepare(problem, snapshot)
            self._try_linearized(problem, snapshot, rows[:1])
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
            if rows.shape[0] == 1 or self.asked == 1:
                if not self._reroute(problem, error):
                    raise
                return self._attempt(problem, snapshot, rows)
            self.asked = 1
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
        if failed is None or getattr(of, failed) is not None:
            return False
        setattr(of, failed, str(error).strip().splitlines()[0])
        if self._shared:
            linearization(of, of.snapshot(), self.sweep).drop()
        self.drop()
        self._shared = self._measured = False
        return True

    def _forget(self, problem: Problem) -> None:
        """Drop what an unfinished pass recorded where the next pass could not tell which batch is which."""
        if not self.complete and not (problem.data.fixed and problem.data.ordered):
            self.drop()

    def _product(self, problem: Problem, snapshot: Snapshot, rows: Tensor) -> Tensor:
        sweep = self.sweep
        if self._single_pass:
            result = problem.sum()
            for single in self.recordings(problem, snapshot, rows.shape[0]):
                assert isinstance(single, (SinglePass, ChunkedRecording))
                result.add(single.multiply(rows, self._columns(problem, single, rows)))
                del single  # a fresh graph is released before the next batch is recorded
            return result.value  # type: ignore[no-any-return]
        total = problem.sum()
        prepared = self._prepared(problem, snapshot)
        reduced = {term: problem.sum() for term in sweep.reduces}
        totals: dict[DatasetTerm, Any] = {}
        for term in sweep.projects:
            totals[term] = self._project(term, rows, prepared)
        tangents: dict[int, Tensor] = {}
        if sweep.reduces:
            for recorded in self._staged(problem, snapshot, rows.shape[0], again=self._ordered):
                assert isinstance(recorded, Staged)
                tangent = tangents[recorded.index] = recorded.tangent(rows, self._columns(problem, recorded, rows))
                for term in sweep.reduces:
                    reduced[term].add(self._reduce(term, recorded, tangent, prepared))
                del recorded
            totals |= {term: stats.value for term, stats in reduced.items()}
            if not (self._ordered or self.complete):  # the next pass gives other batches
                tangents.clear()
        for recorded in self._staged(problem, snapshot, rows.shape[0], again=bool(tangents)):
            chunk = self._columns(problem, recorded, rows)
            if isinstance(recorded, ChunkedRecording):
                total.add(recorded.multiply(rows, chunk))
                self.route = recorded.route
                del recorded
                continue
            known = tangents.pop(recorded.index, None)
            pushed = recorded.tangent(rows, chunk) if known is None else known
            rates = self._rates(recorded, pushed, prepared, totals)
            del known, pushed  # released before the last stage, which is the peak
            total.add(recorded.finish(rows, rates, chunk))
            del recorded
        return total.value  # type: ignore[no-any-return]

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

    def _project(self, term: DatasetTerm, rows: Tensor, prepared: dict[DatasetTerm, Any]) -> Any:
        return chunked(
            lambda part: mapped(lambda v: call(term, "project", v, prepared[term]), part), self._width(), rows
        )

    def _reduce(self, term: DatasetTerm, recorded: Staged, tangent: Tensor, prepared: dict[DatasetTerm, Any]) -> Any:
        recorded.batch.evaluate_loss()

        def reduce(part: Tensor) -> Any:
            return mapped(lambda t: call(term, "reduce", recorded.batch, t, prepared[term]), part)

        return chunked(reduce, self._width(), tangent)

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
            return chunked(lambda part: mapped(lambda t: rate(t, []), part), self._width(), tangent)
        return chunked(rates, self._width(), tangent, values)

    def _width(self) -> int:
        """Columns of totals and rates at a time: unlike the backward passes not measured, so that products repeat."""
        return self.asked or MOST_COLUMNS

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
            self.keeping = self.limit > 0
        for evaluation in problem.evaluations(snapshot, order_matters=again or bool(self.batches)):
            index = evaluation.sample.index
            recorded = self.batches.get(index)
            if recorded is None:
                recorded = self._record(evaluation, columns)
                self._keep(problem, recorded)
            yield recorded
            del recorded  # a fresh graph is released before the next is recorded
        self.complete = self.keeping

    def _share(self, problem: Problem, snapshot: Snapshot) -> None:
        """Take the recordings of the whole problem, where several blocks have the sweep in common and they are kept."""
        whole = problem.whole
        if whole is None or ("sweep", self.sweep.key) not in whole.shared or not self.keeping:
            return
        if self.sweep.dataset_terms:  # their statistics are of the parameters at hand
            return
        source = linearization(whole, snapshot, self.sweep)
        source.races = source.complete
        source.prepare(whole, snapshot)
        shared = {i: r.over(problem) for i, r in source.batches.items()} if source.complete else {}
        if shared and all(r is not None for r in shared.values()):
            self.batches, self.complete, self.route = shared, True, source.route  # type: ignore[assignment]
            self._named["columns"] = source._named["columns"]
            self.notes["recordings"], self._shared = "recordings shared by all blocks", True
            source._sharing.add(self)

    def _record(self, evaluation: Evaluation, columns: int) -> Recording:
        recorded = self._recorded(evaluation, columns)
        if self.sweep.curved and not isinstance(recorded, ChunkedRecording):
            swear_curvature(evaluation)
            if evaluation.problem.model.composite and not self._composite:  # it was recorded with wrong derivatives
                self._composite = True
                recorded = self._recorded(evaluation, columns)
            if isinstance(recorded, SinglePass) and self.sweep.symmetric(evaluation.problem.facts):
                self._swear_symmetric(evaluation, recorded)
        return recorded

    def _swear_symmetric(self, evaluation: Evaluation, recorded: SinglePass) -> None:
        """Once a state, on a few rows where these can be recorded without the others: two products cost little there."""

        def check() -> None:
            sample = recorded
            if (few := few_rows(evaluation)) is not evaluation:
                # Some models take batches of one size.
                with suppress(CurvalgError, RuntimeError, ValueError, TypeError):
                    sample = SinglePass(few, self.sweep.cotangent, self.sweep.rate_of, keep=False)

            def multiply(directions: Sequence[Tensor]) -> Sequence[Tensor | None]:
                return backward(sample.gradients, sample.leaves, directions, retain_graph=True)

            swear_symmetric(multiply, evaluation, self.sweep, lambda: self._size(sample.batch))

        verdict(evaluation, ("symmetric", str(self.sweep)), check, recorded.graphs())

    def _size(self, batch: Batch) -> float:
        """‖z‖ (‖u‖ + ‖u̇(z)‖): what terms make of a tangent as large as the output."""
        batch.evaluate_loss()
        parts = (self.sweep.cotangent(batch), self.sweep.rate(batch, batch.output, {}, {}))
        return float(batch.output.norm()) * sum(float(part.norm()) for part in parts)

    def _recorded(self, evaluation: Evaluation, columns: int) -> Recording:
        sweep, keep = self.sweep, self.keeping
        if (headed := record_headed(evaluation, sweep, keep, columns, self.notes)) is not None:
            return headed
        if self._single_pass:
            return SinglePass(evaluation, sweep.cotangent, sweep.rate_of, keep)
        if sweep.curved:
            return TwoStage(evaluation, sweep.cotangent, keep)
        if not keep and columns == 1:
            return Transient(evaluation)
        if not self._measured:
            self._measured = True
            return self._measure_route(evaluation, columns)
        found = graph(evaluation)
        if self.route == ForwardAD.ROUTE:
            check = partial(evaluation.wrong_forward_ad, found[0], found[1], retain=True)
            if verdict(evaluation, FORWARD_AD, check, [found[0]]) is None:
                return ForwardAD(evaluation, keep, found)
        return TwoStage(evaluation, None, keep, found)

    def _keep(self, problem: Problem, recorded: Recording) -> None:
        if not self.keeping:
            return
        nbytes = graph_bytes(recorded)
        if problem.budget.reserve(self, nbytes):
            self.batches[recorded.index] = recorded
            return
        self.keeping = recorded.keep = False
        if not self._ordered:  # which batch is which could not be told in the next pass
            self.drop()
        kept = f"{len(self.batches)} batches kept" if self.batches else "no batch kept"
        needed, limit = nbytes / 2**20, problem.budget.limit / 2**20
        self.notes["budget"] = f"{kept}: one more needs {needed:.3g} MiB of a budget of {limit:.3g} MiB"

    # -- choices ----------------------------------------------------------------------------------------------------------

    def _measure_route(self, evaluation: Evaluation, columns: int) -> Recording:
        """J v by two backward passes through the recorded graph, by forward AD with a forward pass of its own, or by rows."""
        problem, choice, keep = evaluation.problem, self._named["tangents"], self.keeping
        known = problem.known(choice)
        found = graph(evaluation)
        z, leaves, _ = found
        twice = twice_backward(evaluation, z, leaves) is not None
        # With several columns it would call the model for each of them.
        races = self.races and columns == 1
        forward = problem.no_forward_ad is None and not (twice and (known == TwoStage.ROUTE or not races))
        if forward:
            check = partial(evaluation.wrong_forward_ad, z, leaves, retain=True)
            problem.no_forward_ad = verdict(evaluation, FORWARD_AD, check, [z])
            forward = problem.no_forward_ad is None
        possible: dict[str, Staged] = {}
        if forward:
            possible[ForwardAD.ROUTE] = ForwardAD(evaluation, keep, found)
        if twice or not possible:
            two = TwoStage(evaluation, None, keep, found)
            possible[two.route.NAME] = two
        self.route = self._choose_route(problem, possible, choice)
        return possible[self.route]

    def _choose_route(self, problem: Problem, possible: dict[str, Staged], choice: str) -> str:
        if (known := problem.known(choice)) in possible:
            problem.choices[choice] = known
            self.notes["tangents"] = f"tangents by {known}, as chosen before"
            return str(known)
        rows = torch.ones(1, problem.layout.size, dtype=problem.dtype, device=problem.device)
        seconds = {}
        if len(possible) > 1:
            for name, recorded in possible.items():
                keep, recorded.keep = recorded.keep, True
                # Both have run before, when they were verified; forward AD calls the model in every run.
                run, rounds = partial(recorded.tangent, rows, 1), 1 if name == ForwardAD.ROUTE else 2
                seconds[name] = min(timed(run) for _ in range(rounds))
                recorded.keep = keep
        route = TwoStage.ROUTE if TwoStage.ROUTE in possible else next(iter(possible))
        if seconds and seconds[ForwardAD.ROUTE] < 0.9 * seconds[route]:
            route = ForwardAD.ROUTE
        problem.choices[choice] = route
        shown = ", ".join(f"{name} {1e3 * t:.2g} ms" for name, t in seconds.items())
        reasons = {"forward AD": problem.no_forward_ad, "two backward passes": problem.no_double_backward}
        without = "; ".join(f"not by {name}: {reason}" for name, reason in reasons.items() if reason is not None)
        self.notes["tangents"] = f"tangents by {route} ({f'{shown} on one batch' if shown else without})"
        return route

    def _try_linearized(self, problem: Problem, snapshot: Snapshot, rows: Tensor) -> None:
        """After many products: tangents by a linearised program, if it is verified and faster."""
        if self.sweep.curved or not self.complete or not problem.data.ordered or self._shared:
            return
        if any(isinstance(r, ChunkedRecording) for r in self.batches.values()):
            return
        self._tried = True
        choice = self._named["program"]
        known = problem.known(choice)
        if known is False:
            self.notes["program"] = "no linearised program, as chosen before"
            problem.choices[choice] = False
            return
        problem.choices[choice] = False
        try:
            replaced = self._linearized(problem, snapshot, rows, measured=bool(known))
        except OrderError:
            replaced = "the loader gives the samples in another order each time"
        if isinstance(replaced, str):
            self.notes["program"] = f"no linearised program: {replaced}"
            return
        problem.choices[choice] = True
        self.batches = replaced
        self.route = Linearized.ROUTE
        compiled = "" if problem.compiler is None else f", compiled by {problem.compiler}"
        self.notes["tangents"] = f"tangents by {self.route}{compiled}, verified and faster"

    def _linearized(
        self, problem: Problem, snapshot: Snapshot, rows: Tensor, *, measured: bool
    ) -> dict[int, Recording] | str:
        """All batches as linearised programs, or why not."""
        replaced: dict[int, Recording] = {}
        for evaluation in problem.evaluations(snapshot, order_matters=True):
            old = self.batches[evaluation.sample.index]
            assert isinstance(old, Staged)
            reason = None
            try:
                new = Linearized(evaluation, True, problem.compiler)
                reason = decline_linearized(new, old, rows)
                if reason is None and not replaced and not measured:
                    before = fastest(lambda o=old: o.tangent(rows, 1))  # type: ignore[misc]
                    after = fastest(lambda n=new: n.tangent(rows, 1))  # type: ignore[misc]
                    reason = (
                        None
                        if after < 0.9 * before
                        else f"not faster ({1e3 * after:.2g} against {1e3 * before:.2g} ms)"
                    )
            except CurvalgError:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            if reason is not None:
                return reason
            replaced[evaluation.sample.index] = new
        return replaced

    def _columns(self, problem: Problem, recorded: Recording, rows: Tensor) -> int:
        """Columns in one backward pass: as asked for, or measured on the first batch that meets so many."""
        if self.asked is not None:
            return self.asked
        if rows.shape[0] == 1 or isinstance(recorded, Transient):
            return 1
        width = max(w for w in WIDTHS if w <= rows.shape[0])
        if width not in self._chunks:
            choice = f"{self._named['columns']}, from {width}"
            keep, recorded.keep = recorded.keep, True
            try:
                self._chunks[width] = self._choose_columns(problem, recorded, rows, width, problem.known(choice))
            finally:
                recorded.keep = keep
            problem.choices[choice] = self._chunks[width]
        return self._chunks[width]

    def _choose_columns(
        self, problem: Problem, recorded: Recording, rows: Tensor, width: int, known: int | None
    ) -> int:
        """Columns at a time: one, a width, or a quarter of it; as chosen before, or what costs least a column."""

        def run(part: Tensor, chunk: int) -> Tensor:
            if isinstance(recorded, (SinglePass, ChunkedRecording)):
                return recorded.multiply(part, chunk)
            tangent = recorded.tangent(part, chunk)
            return recorded.finish(part, tangent, chunk)

        topic = f"columns {width}"
        # What was chosen at another state may be wrong at this one.
        if known != 1 and (known is None or problem.verify) and (reason := _unlike_single(run, rows)) is not None:
            self.notes[topic] = f"from {width} columns on one after the other: {reason}"
            return 1
        if known is not None:
            self.notes[topic] = f"from {width} columns on {known} at a time, as chosen before"
            return known
        most = COLUMN_MEMORY // max(1, graph_bytes(recorded))
        seconds: dict[int, float] = {}
        for chunk in (1, *(w for w in (width // 4, width) if 1 < w <= most)):
            seconds[chunk] = fastest(lambda c=chunk: run(rows[:c], c)) / chunk  # type: ignore[misc]
            if chunk * seconds[chunk] > LONG and seconds[chunk] > WORSE * seconds[1]:
                break  # it is work, not calls, that takes the time: wider ones are no better, and long to measure
        chosen = min(seconds, key=lambda chunk: seconds[chunk])
        shown = ", ".join(f"{chunk}: {1e3 * t:.2g} ms" for chunk, t in seconds.items())
        self.notes[topic] = f"from {width} columns on {chosen} at a time ({shown} a column, on one batch)"
        return chosen


def _unlike_single(run: Callable[[Tensor, int], Tensor], rows: Tensor) -> str | None:
    """Why columns must not be taken in one pass: what they give differs from one alone."""
    try:
        batched, single = run(rows[:2], 2), run(rows[:1], 1)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return str(error).strip().splitlines()[0]
    if bool((batched[:1] - single).norm() <= torch.finfo(rows.dtype).eps ** 0.75 * single.norm()):
        return None
    return "a batched product differs from a single one"


def linearization(problem: Problem, snapshot: Snapshot, sweep: Sweep) -> Linearization:
    """The linearisation of a sweep, shared by all expressions that contain it."""
    kept = problem.kept(snapshot)
    key = ("linearization", sweep.key)
    if key not in kept:
        kept[key] = Linearization(problem, sweep)
    return kept[key]  # type: ignore[no-any-return]

"""Recording of the batches of a sweep: verified, and with tangents by the fastest route that is right."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import TypeAlias

from torch import Tensor

from curvalg.errors import CurvalgError
from curvalg.lowering.sweeps.chunked import ChunkedRecording, record_headed
from curvalg.lowering.sweeps.keeping import Keeping
from curvalg.lowering.sweeps.recordings import SinglePass, Staged, TwoStage, graph
from curvalg.lowering.sweeps.sweep import Sweep
from curvalg.lowering.sweeps.tangents import ForwardAD, Transient
from curvalg.problem import Batch, Evaluation, Problem
from curvalg.problem.evaluation import FORWARD_AD
from curvalg.problem.kept.race import Race
from curvalg.problem.verification.curvature_checks import swear_curvature, swear_symmetric
from curvalg.problem.verification.reverse import twice_backward
from curvalg.problem.verification.sharded_checks import swear_parts
from curvalg.problem.verification.tangent_checks import TangentNotes
from curvalg.problem.verification.verdicts import few_rows, verdict
from curvalg.tensors.backward import backward

Recording: TypeAlias = SinglePass | Staged | ChunkedRecording


class Recorder:
    """The recorder of one sweep on one problem at one snapshot.

    Args:
        problem: the problem.
        sweep: the terms.
        notes: topic -> what was chosen and why.
        worth: times what is recorded, to know whether keeping it pays.

    Attributes:
        route: of tangents, where no term is curved.
        race: between the routes, where there are several.
    """

    def __init__(self, problem: Problem, sweep: Sweep, notes: dict[str, str], worth: Keeping) -> None:
        self.sweep, self.notes, self._worth = sweep, notes, worth
        self.route = TwoStage.ROUTE
        self.race: Race[str] = Race(problem.measured, problem.measured.name("tangents", sweep))
        self._measured = False
        self._composite = problem.model.composite
        self._single_pass = sweep.curved and not sweep.dataset_terms

    def measure_again(self) -> None:
        """Choose a route anew at the next batch."""
        self._measured = False

    def record(self, evaluation: Evaluation, columns: int, keep: bool) -> Recording:
        """Record a batch for products with so many columns.

        Args:
            evaluation: the batch.
            columns: of the product it is for.
            keep: whether it is kept after the product.
        """
        if self.sweep.curved and not evaluation.snapshot.structure.found.curved:
            # Before there is a recording, whose memory would add to that of the comparison; of the few rows' operations.
            swear_curvature(evaluation, beforehand=True)
        recorded = self._recorded(evaluation, columns, keep)
        if self.sweep.curved and not isinstance(recorded, ChunkedRecording):
            swear_curvature(evaluation)
            if evaluation.problem.model.composite and not self._composite:  # it was recorded with wrong derivatives
                self._composite = True
                recorded = self._recorded(evaluation, columns, keep)
            if isinstance(recorded, SinglePass) and self.sweep.symmetric(evaluation.problem.facts):
                self._swear_symmetric(evaluation, recorded)
        return recorded

    def _swear_symmetric(self, evaluation: Evaluation, recorded: SinglePass) -> None:
        """Check symmetry once a state, on a few rows where these can be recorded without the others, as products cost less."""

        def check() -> None:
            sample = recorded
            if (few := few_rows(evaluation)) is not evaluation:
                # Some models take batches of one size.
                with suppress(CurvalgError, RuntimeError, ValueError, TypeError):
                    sample = SinglePass(few, self.sweep.cotangent, self.sweep.rate_of, keep=False)

            def multiply(directions: Sequence[Tensor]) -> Sequence[Tensor | None]:
                return backward(sample.gradients, sample.leaves, directions, retain_graph=True)

            swear_symmetric(multiply, evaluation, self.sweep, lambda: self._size(sample.batch))

        verdict(evaluation, ("symmetric", str(self.sweep)), check, recorded.operations)

    def _size(self, batch: Batch) -> float:
        """The size ‖z‖ (‖u‖ + ‖u̇(z)‖) of what terms make of a tangent as large as the output."""
        batch.evaluate_loss()
        parts = (self.sweep.cotangent(batch), self.sweep.rate(batch, batch.output, {}, {}))
        return float(batch.output.norm()) * sum(float(part.norm()) for part in parts)

    def _recorded(self, evaluation: Evaluation, columns: int, keep: bool) -> Recording:
        sweep = self.sweep
        if evaluation.problem.group.sharded:  # the same calls on all processes, whatever is true on one of them
            swear_parts(evaluation)
            single = partial(SinglePass, evaluation, sweep.cotangent, sweep.rate_of, keep=False)
            return (
                single()
                if self._single_pass
                else TwoStage(evaluation, sweep.cotangent if sweep.curved else None, False)
            )
        if (headed := record_headed(evaluation, sweep, keep, columns, self.notes)) is not None:
            return headed
        if self._single_pass:
            record = partial(SinglePass, evaluation, sweep.cotangent, sweep.rate_of, keep)
            return self._worth.recording(evaluation.sample.index, record) if keep else record()
        if sweep.curved:
            return TwoStage(evaluation, sweep.cotangent, keep)
        if not keep and columns == 1:
            return Transient(evaluation)
        if not self._measured:
            self._measured = True
            return self._choose_route(evaluation, columns, keep)
        found = graph(evaluation)
        if self.route == ForwardAD.ROUTE:
            check = partial(evaluation.wrong_forward_ad, found[0], found[1], retain=True)
            if verdict(evaluation, FORWARD_AD, check, [found[0]]) is None:
                return ForwardAD(evaluation, keep, found)
        return TwoStage(evaluation, None, keep, found)

    def _choose_route(self, evaluation: Evaluation, columns: int, keep: bool) -> Recording:
        """J v by two backward passes through the graph, by forward AD with a pass of its own, or by rows.

        What is not needed is not verified: forward AD is tried here only where the graph cannot be differentiated twice, or
        where it was chosen before. Else the two are timed once enough products were made (:mod:`.routes`).
        """
        found = graph(evaluation)
        z, leaves, _ = found
        notes, known = evaluation.problem.noted(TangentNotes), self.race.known
        twice = twice_backward(evaluation, z, leaves) is not None
        # With several columns forward AD would call the model for each of them.
        chosen_before = known == ForwardAD.ROUTE and columns == 1
        forward = notes.no_forward_ad is None and (chosen_before or not twice)
        forward = forward and evaluation.decline_forward_ad(z, leaves) is None
        recorded = ForwardAD(evaluation, keep, found) if forward else TwoStage(evaluation, None, keep, found)
        self.route = ForwardAD.ROUTE if isinstance(recorded, ForwardAD) else recorded.route.NAME
        if known == self.route:
            self.race.decide(self.route)
            why = ", as chosen before"
        else:
            reasons = {ForwardAD.ROUTE: notes.no_forward_ad, TwoStage.ROUTE: notes.no_double_backward}
            without = "; ".join(f"not by {name}: {reason}" for name, reason in reasons.items() if reason is not None)
            why = f" ({without})" if without else ""
        self.notes["tangents"] = f"tangents by {self.route}{why}"
        return recorded

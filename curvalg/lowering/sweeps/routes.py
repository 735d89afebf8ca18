"""The race between the routes to tangents of what is recorded, begun once enough products were made to pay for it.

It shows what a fresh product would take as well, and so whether what is recorded is worth its memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from curvalg.lowering.sweeps.keeping import Keeping
from curvalg.lowering.sweeps.recorder import Recorder, Recording
from curvalg.lowering.sweeps.recordings import Staged, TwoStage, graph
from curvalg.lowering.sweeps.tangents import ForwardAD
from curvalg.problem import Evaluation, Problem, Snapshot
from curvalg.problem.data.batches import OrderError
from curvalg.problem.evaluation import FORWARD_AD
from curvalg.problem.kept.race import Candidate
from curvalg.problem.verification.tangent_checks import TangentNotes
from curvalg.problem.verification.verdicts import verdict

PAID = 8
"""Products after which routes are compared: verifying forward AD, a run of it and a call of the model take about three
gradients of one batch, which is less than a quarter of what these products took."""
WARM, TIMED = 2, 4
"""Products after which the tangents of one are timed, and after which no more are."""


class Routes:
    """The choice between two backward passes and forward AD for the recordings of one sweep.

    Args:
        recorder: of the sweep, whose race it is.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.after = PAID
        self.tried = False
        self._seconds: list[float] = []
        """Of tangents by two backward passes, in products that were made anyway."""

    def pushing(self, recorded: Staged, products: int, run: Callable[[], Tensor]) -> Tensor:
        """A tangent from what is kept, timed in a few products.

        Args:
            recorded: the batch.
            products: the number of this product, which has one column.
            run: takes the tangent.
        """
        if self.tried or recorded.index or not recorded.keep or not WARM < products <= TIMED:
            return run()
        seconds, tangent = self._recorder.race.timed(run)
        self._seconds.append(seconds)
        return tangent

    def replace(
        self, problem: Problem, snapshot: Snapshot, batches: dict[int, Recording], worth: Keeping | None
    ) -> dict[int, Recording] | None:
        """All batches with tangents by forward AD, on the graphs that they have; None where they stay as they are.

        Args:
            problem: the problem.
            snapshot: the state.
            batches: what is kept.
            worth: decides whether it is kept on; None where it has to be.
        """
        self.tried = True
        recorder, notes = self._recorder, problem.noted(TangentNotes)
        race = recorder.race
        if race.chosen is not None or race.known == TwoStage.ROUTE or notes.no_forward_ad is not None:
            return None
        replaced: dict[int, Recording] = {}
        try:
            for evaluation in problem.evaluations(snapshot, order_matters=True):
                old = batches[evaluation.sample.index]
                if not isinstance(old, TwoStage) or old.route.NAME != TwoStage.ROUTE:
                    return None
                found = old.z, old.leaves, old.batch
                check = partial(evaluation.wrong_forward_ad, old.z, old.leaves, retain=True)
                if (reason := verdict(evaluation, FORWARD_AD, check, [old.z])) is not None:
                    notes.no_forward_ad = reason
                    recorder.notes["tangents"] = f"tangents by {TwoStage.ROUTE} (not by {ForwardAD.ROUTE}: {reason})"
                    return None
                new = ForwardAD(evaluation, old.keep, found)
                if not replaced:
                    fastest = self._faster(problem, old, new)
                    if worth is not None and not self._pays(worth, evaluation):
                        return None
                    if fastest != ForwardAD.ROUTE:
                        return None
                replaced[evaluation.sample.index] = new
        except OrderError:
            return None
        recorder.route = ForwardAD.ROUTE
        return replaced

    def _faster(self, problem: Problem, old: TwoStage, new: ForwardAD) -> str:
        """The faster of the two on one batch; both have run before."""
        race = self._recorder.race
        rows = torch.ones(1, problem.size, dtype=problem.dtype, device=problem.device)
        chosen = race.run(
            {
                TwoStage.ROUTE: Candidate(
                    partial(old.tangent, rows, 1),
                    rounds=1,
                    warm=True,
                    seconds=lambda: min(self._seconds, default=None),
                ),
                ForwardAD.ROUTE: Candidate(partial(new.tangent, rows, 1), handicap=1 / 0.9, rounds=1, warm=True),
            }
        )
        why = ", as chosen before" if race.recalled else f" ({race.shown()} on one batch)"
        self._recorder.notes["tangents"] = f"tangents by {chosen}{why}"
        return chosen

    def _pays(self, worth: Keeping, evaluation: Evaluation) -> bool:
        """Whether a batch is worth keeping: a fresh product takes its tangent by forward AD, and calls the model once more."""
        tangents, finish = self._recorder.race.seconds, worth.multiplied(evaluation.sample.index)
        if not worth.open or ForwardAD.ROUTE not in tangents or finish is None:  # not measured, or not in time
            return True
        calling, _ = self._recorder.race.timed(partial(graph, evaluation))
        return worth.judge(min(tangents.values()) + finish, tangents[ForwardAD.ROUTE] + calling + finish)

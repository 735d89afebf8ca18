"""The race between the routes to tangents of what is recorded, begun once enough products were made to pay for it."""

from __future__ import annotations

from functools import partial

import torch

from curvalg.lowering.sweeps.recorder import Recorder, Recording
from curvalg.lowering.sweeps.recordings import TwoStage
from curvalg.lowering.sweeps.tangents import ForwardAD
from curvalg.problem import Problem, Snapshot
from curvalg.problem.data.batches import OrderError
from curvalg.problem.evaluation import FORWARD_AD
from curvalg.problem.kept.race import Candidate
from curvalg.problem.verification.tangent_checks import TangentNotes
from curvalg.problem.verification.verdicts import verdict

PAID = 8
"""Products after which routes are compared: verifying forward AD and a run of each take about three gradients of one batch,
which is less than a quarter of what these products took."""


class Routes:
    """The choice between two backward passes and forward AD for the recordings of one sweep.

    Args:
        recorder: of the sweep, whose race it is.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.after = PAID
        self.tried = False

    def replace(
        self, problem: Problem, snapshot: Snapshot, batches: dict[int, Recording]
    ) -> dict[int, Recording] | None:
        """All batches with tangents by forward AD, on the graphs that they have; None where they stay as they are."""
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
                if not replaced and self._faster(problem, old, new) != ForwardAD.ROUTE:
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
                TwoStage.ROUTE: Candidate(partial(old.tangent, rows, 1), rounds=1, warm=True),
                ForwardAD.ROUTE: Candidate(partial(new.tangent, rows, 1), handicap=1 / 0.9, rounds=1, warm=True),
            }
        )
        why = ", as chosen before" if race.recalled else f" ({race.shown()} on one batch)"
        self._recorder.notes["tangents"] = f"tangents by {chosen}{why}"
        return chosen

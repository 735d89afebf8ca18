"""Tangents by linearised programs, after many products, where these are verified on every batch and faster."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from curvalg.errors import CurvalgError
from curvalg.lowering.sweeps.recorder import Recording
from curvalg.lowering.sweeps.recordings import Staged
from curvalg.lowering.sweeps.tangents import Linearized, decline_linearized
from curvalg.problem import Evaluation, Problem, Snapshot
from curvalg.problem.data.batches import OrderError
from curvalg.problem.kept.race import Candidate, Race

AMORTISED = 256
"""Products after which a linearised program may be tried: recording one takes 7 to 300 gradients."""


class Programs:
    """The choice whether a sweep's tangents are taken by programs.

    Args:
        problem: the problem.
        sweep: what they are tangents of.
        notes: topic -> what was chosen and why.
    """

    def __init__(self, problem: Problem, sweep: object, notes: dict[str, str]) -> None:
        self.race: Race[bool] = Race(problem.measured, problem.measured.name("program", sweep))
        self.after = AMORTISED
        self.tried = False
        self._notes = notes

    def replace(
        self, problem: Problem, snapshot: Snapshot, batches: dict[int, Recording], rows: Tensor
    ) -> dict[int, Recording] | None:
        """All batches as linearised programs; None where they stay as they are."""
        self.tried = True
        if self.race.known is False:
            self._notes["program"] = "no linearised program, as chosen before"
            self.race.decide(False)
            return None
        replaced: dict[int, Recording] = {}
        try:
            for evaluation in problem.evaluations(snapshot, order_matters=True):
                old = batches[evaluation.sample.index]
                assert isinstance(old, Staged)
                made = self._made(evaluation, old, rows, problem.compiler, first=not replaced)
                if isinstance(made, str):
                    self._decline(made)
                    return None
                replaced[evaluation.sample.index] = made
        except OrderError:
            self._decline("the loader gives the samples in another order each time", of_the_model=False)
            return None
        compiled = "" if problem.compiler is None else f", compiled by {problem.compiler}"
        self._notes["tangents"] = f"tangents by {Linearized.ROUTE}{compiled}, verified and faster"
        return replaced

    def _decline(self, reason: str, *, of_the_model: bool = True) -> None:
        self.race.decide(False, of_the_model=of_the_model)
        self._notes["program"] = f"no linearised program: {reason}"

    def _made(
        self, evaluation: Evaluation, old: Staged, rows: Tensor, compiler: str | None, *, first: bool
    ) -> Linearized | str:
        """A batch as a program, timed where it is the first; or why not."""
        race = self.race
        try:
            new = Linearized(evaluation, True, compiler)
            if not first:
                return decline_linearized(new, old, rows) or new
            runs = {  # the one has run in products, the other where the two were compared
                False: Candidate(partial(old.tangent, rows, 1), rounds=1, warm=True),
                True: Candidate(partial(new.tangent, rows, 1), rounds=1, warm=True, handicap=1 / 0.9),
            }
            if race.run(runs, differs=lambda _: decline_linearized(new, old, rows)):
                return new
        except CurvalgError:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        if True in race.declined:
            return race.declined[True]
        after, before = (1e3 * race.seconds[way] for way in (True, False))
        return f"not faster ({after:.2g} against {before:.2g} ms)"

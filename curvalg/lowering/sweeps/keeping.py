"""The choice whether recordings are kept, by the clocks of products that were made anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from curvalg.problem import Problem
from curvalg.problem.kept.race import Race

T = TypeVar("T")

FASTER = 1.1
"""How many times as fast as a fresh product one of what is kept has to be: memory is there for what gains by it."""
WARM = 2
"""Products after which those that follow take as long as all others."""
PRODUCTS = 2
"""Products from kept recordings that are timed, of which the faster counts: an interruption only makes one longer."""


class Keeping:
    """Whether the recordings of one sweep are worth their memory.

    In a single pass a fresh product records a batch and multiplies it, a kept one only multiplies: the time of the recording,
    which is made in either case, says what keeping saves. In two stages a fresh product calls the model by forward AD and once
    more, which is compared where routes are (:mod:`.routes`). Products with several columns save less, and are not asked.

    Args:
        problem: the problem.
        sweep: the terms.
        notes: topic -> what was chosen and why.
    """

    def __init__(self, problem: Problem, sweep: object, notes: dict[str, str]) -> None:
        self.race: Race[bool] = Race(problem.measured, problem.measured.name("kept", sweep))
        self._notes = notes
        self._recorded: dict[int, float] = {}
        self._multiplied: dict[int, list[float]] = {}
        # A CUDA graph replays what is kept alone, however long an eager product takes.
        self.open = not problem.graphs and self.race.known is None
        if self.race.known is False:
            notes["kept"] = "not kept: no faster than fresh, as chosen before"
            self.race.decide(False)

    @property
    def declined(self) -> bool:
        """Whether nothing is to be kept."""
        return self.race.known is False

    def recording(self, index: int, run: Callable[[], T]) -> T:
        """Record a batch, timed where that is still to be known."""
        if not self.open:
            return run()
        self._recorded[index], result = self.race.timed(run)
        return result

    def multiplying(self, index: int, run: Callable[[], T]) -> T:
        """Multiply what is kept of a batch by one column, timed where that is still to be known."""
        if not self.open:
            return run()
        seconds, result = self.race.timed(run)
        self._multiplied.setdefault(index, []).append(seconds)
        return result

    def multiplied(self, index: int) -> float | None:
        """The seconds of that for one batch, once it is known."""
        seconds = self._multiplied.get(index, [])
        return min(seconds) if len(seconds) >= PRODUCTS else None

    def decide(self) -> bool:
        """Whether it is known from now on that keeping does not pay, of a single pass."""
        times = {index: seconds for index, seconds in self._multiplied.items() if index in self._recorded}
        if not times or min(map(len, times.values())) < PRODUCTS:
            return False
        multiplied = sum(min(seconds) for seconds in times.values())
        return not self.judge(multiplied, multiplied + sum(self._recorded[index] for index in times))

    def judge(self, kept: float, fresh: float) -> bool:
        """Whether keeping pays, by the seconds of a product from what is kept and of a fresh one."""
        self.open = False
        gain = fresh / kept if kept else FASTER
        pays = self.race.decide(gain >= FASTER, of_the_model=True)
        self._notes["kept"] = f"{'kept' if pays else 'not kept'}: {gain:.3g} times as fast as fresh"
        return pays

"""The choice between several ways to the same numbers: compared, timed, remembered and reported."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from curvalg.problem.kept.measured import Measured
from curvalg.tensors.clock import timed

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

LONG = 0.05
"""Seconds of a run above which one is enough: what warming up saves is little of it."""
ENOUGH = 0.5
"""Seconds after which no further turn of a race is run."""
SPENT = 3.0
"""Runs of the reference, as wide as the widest way, that a race may take in all: about three gradients where a run is one."""


@dataclass(frozen=True)
class Candidate:
    """One way that takes part in a race.

    Args:
        run: takes it once.
        work: what a run gives, as a number of columns: seconds are compared by the column.
        handicap: how many times as long it is counted, so that it has to be clearly faster.
        rounds: timed runs in each turn; one where a run is long.
        warm: whether it has run before, so that nothing is made at its first run.
        seconds: gives those of a run that was made and timed already when it comes to measuring, or None.
    """

    run: Callable[[], Any]
    work: float = 1.0
    handicap: float = 1.0
    rounds: int = 2
    warm: bool = False
    seconds: Callable[[], float | None] = lambda: None


class Race(Generic[K]):
    """A choice between ways that give the same numbers up to rounding.

    What was chosen in an earlier run, at an earlier state of the model or by another problem of it is not measured again;
    where ways are compared, it is compared.

    Args:
        measured: where choices are remembered.
        name: of the choice.

    Attributes:
        chosen: the way; None before it was chosen.
        recalled: whether it was known and not measured.
        seconds: by way, where they were measured: of one column.
        declined: way -> why it cannot be taken.
    """

    def __init__(self, measured: Measured, name: str) -> None:
        self._measured, self.name = measured, name
        self.chosen: K | None = None
        self.recalled = False
        self.seconds: dict[K, float] = {}
        self.declined: dict[K, str] = {}

    @property
    def of_an_earlier_run(self) -> bool:
        """Whether an earlier run has chosen."""
        return self.name in self._measured.recalled

    @property
    def known(self) -> K | None:
        """The choice of an earlier run or state, or None."""
        return self._measured.known(self.name)  # type: ignore[no-any-return]

    def timed(self, run: Callable[[], T]) -> tuple[float, T]:
        """The seconds of a run that is made anyway, and its result."""
        return timed(run, self._measured.device)

    def decide(self, way: K, *, of_the_model: bool = False) -> K:
        """Choose a way, and remember it.

        Args:
            way: the choice.
            of_the_model: whether it was measured, so that it holds for other problems of the model as well.
        """
        self.chosen = self._measured.choices[self.name] = way
        if of_the_model:
            self._measured.remembered.put(self.name, way)
        return way

    def forget(self) -> None:
        """Measure again: what made a way impossible has changed."""
        self._measured.choices.pop(self.name, None)
        self._measured.remembered.forget(self.name)
        self.chosen = None
        self.declined.clear()

    def run(
        self,
        candidates: Mapping[K, Candidate],
        *,
        differs: Callable[[K], str | None] | None = None,
        insist: bool = False,
        turns: int = 1,
        enough: Callable[[Mapping[K, float]], bool] = lambda seconds: False,
        within: float = SPENT,
    ) -> K:
        """Choose the fastest way by measuring.

        Args:
            candidates: by way; the first is the reference, which can always be taken.
            differs: way -> why it cannot be taken beside the reference, or None.
            insist: take the reference only if no other can be taken.
            turns: how often each is measured, all of them in turn, so that a drift hits all alike.
            enough: by the seconds until now, whether no further way need be measured.
            within: runs of the reference, as wide as the widest way, that measuring may take; ways left untimed lose.
        """
        first, known = next(iter(candidates)), self.known

        def possible(way: K) -> bool:
            if way != first and differs is not None and (reason := differs(way)) is not None:
                self.declined[way] = reason
                return False
            return True

        if known is not None and known in candidates and possible(known):
            self.recalled = True
            return self.decide(known)
        self.recalled = False
        others = [way for way in candidates if way != first and possible(way)]
        left = others if insist and others else [first, *others]
        self.seconds = {}
        if len(left) > 1:
            self.seconds = measure({way: candidates[way] for way in left}, turns, enough, self._measured.device, within)
        fastest = min(self.seconds, key=lambda way: self.seconds[way] * candidates[way].handicap, default=left[0])
        return self.decide(fastest, of_the_model=bool(self.seconds))

    def shown(self) -> str:
        """The measured times as text for people."""
        return ", ".join(f"{way} {1e3 * seconds:.2g} ms" for way, seconds in self.seconds.items())


def measure(
    candidates: Mapping[K, Candidate],
    turns: int,
    enough: Callable[[Mapping[K, float]], bool],
    device: torch.device,
    within: float = math.inf,
) -> dict[K, float]:
    """Seconds by way and column, the least of all rounds.

    Every turn of a way begins with a run that is not timed: it makes again what another has pushed out of a memory that is too
    small for both. A race that has taken as long as some runs of the first way ends there: ways that were not timed yet lose.
    """
    best: dict[K, float] = {}
    begin, reference = time.perf_counter(), next(iter(candidates))
    widest = max(candidate.work for candidate in candidates.values())

    def over() -> bool:
        return time.perf_counter() - begin > within * widest * best.get(reference, math.inf)

    for turn in range(turns):
        for way, candidate in candidates.items():
            if over():
                return best
            rounds = candidate.rounds
            if turn == 0 and (before := candidate.seconds()) is not None:
                best[way], rounds = before / candidate.work, rounds - 1
            elif not candidate.warm:
                first = timed(candidate.run, device)[0]
                if first > LONG:
                    rounds = 1
                    if turns == 1:
                        best[way] = first / candidate.work
                        rounds = 0
            for _ in range(rounds):
                seconds = timed(candidate.run, device)[0]
                best[way] = min(best.get(way, math.inf), seconds / candidate.work)
                if seconds > LONG or over():
                    break
            if turn == 0 and enough(best):
                return best
        if time.perf_counter() - begin > ENOUGH:
            break
    return best

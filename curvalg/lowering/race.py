"""Which of several ways to the same product is taken: measured once, remembered, and told."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from curvalg.errors import ProblemError
from curvalg.problem import Problem

Way = Callable[[Tensor], Tensor]
"""x (n, K) -> the product."""


class Impossible(Exception):
    """A way cannot be taken; the message says why."""


class Race:
    """The choice between ways of one matrix at one snapshot; for single columns and for several it may differ.

    Args:
        problem: keeps what was chosen, for runs that go on later.
        subject: what the products are of.
        patience: columns that are multiplied in the first way before the others are tried, which costs as much.
    """

    def __init__(self, problem: Problem, subject: str, patience: int) -> None:
        self._names = {wide: problem.choice("way", f"{subject}, {width}") for wide, width in _WIDTHS.items()}
        self._counted = problem.choice("columns multiplied", subject)
        self.columns = int(problem.recalled.get(self._counted, 0))
        self._patience = patience
        self._chosen: dict[bool, str] = {}
        self.notes: dict[bool, str] = {}
        """What was measured, for single columns and for several."""
        self.declined: dict[str, str] = {}
        """Why a way cannot be taken."""

    def chosen(self, wide: bool) -> str | None:
        """The way that is taken for one column (False) or several (True); None before it was measured."""
        return self._chosen.get(wide)

    def forget(self, problem: Problem) -> None:
        """Measure again: what made a way impossible has changed."""
        for name in self._names.values():
            problem.choices.pop(name, None)
        self._chosen.clear()
        self.declined.clear()

    def count(self, problem: Problem, columns: int) -> None:
        """Note that so many more columns are multiplied."""
        self.columns += columns
        problem.choices[self._counted] = self.columns

    def due(self, problem: Problem, wide: bool) -> bool:
        """Whether a product is to be measured, or its way known from an earlier run."""
        return self.columns > self._patience or self._names[wide] in problem.recalled

    def choose(self, problem: Problem, ways: Mapping[str, Way], x: Tensor, *, insist: bool = False) -> str:
        """Measure all ways on these columns and remember the fastest.

        The first way is the reference: one whose product differs from it is not taken. What was chosen in an earlier run, or
        at an earlier state of the model, is not measured again, but compared.

        Args:
            problem: keeps what was chosen.
            ways: by name.
            x: columns (n, K).
            insist: take the first way only if no other can be taken.
        """
        wide = x.shape[1] > 1
        name, first = self._names[wide], next(iter(ways))
        known: str | None = problem.known(name)
        if known is not None and known in ways and (known == first or self._possible(known, ways, x)):
            self._chosen[wide] = known
            self.notes[wide] = f"{_WIDTHS[wide]}: {known}, as chosen before"
        else:
            others = [way for way in ways if way != first and self._possible(way, ways, x)]
            possible = others if insist and others else [first, *others]
            seconds = dict(zip(possible, race(*(partial(ways[way], x) for way in possible)), strict=True))
            self._chosen[wide] = min(possible, key=lambda way: seconds[way])
            shown = ", ".join(f"{way} {1e3 * s / x.shape[1]:.2g} ms" for way, s in seconds.items())
            self.notes[wide] = f"{_WIDTHS[wide]}: {shown} a column"
        problem.choices[name] = self._chosen[wide]
        return self._chosen[wide]

    def _possible(self, name: str, ways: Mapping[str, Way], x: Tensor) -> bool:
        """Whether a way can be taken and agrees with the first."""
        try:
            got = ways[name](x)
        except (Impossible, ProblemError) as error:
            self.declined[name] = str(error)
            return False
        expected = next(iter(ways.values()))(x)
        if bool((got - expected).norm() <= torch.finfo(x.dtype).eps ** 0.5 * expected.norm()):
            return True
        self.declined[name] = "its product differs from the ordinary one"
        return False


_WIDTHS = {False: "one column", True: "several columns"}

LONG = 0.05
"""Seconds of a run above which one is enough: what warming up saves is little of it."""


def fastest(run: Callable[[], Any]) -> float:
    """Seconds of the faster of two runs after one to warm up; of a long run, of the only one."""
    first = timed(run)
    return first if first > LONG else min(timed(run) for _ in range(2))


ENOUGH = 0.5
"""Seconds after which no further round of a race is run."""


def race(*runs: Callable[[], Any]) -> list[float]:
    """Seconds of the fastest of four runs of each, two at a time in turn, so that a drift hits all alike.

    Every turn begins with a run that is not timed: it makes again what another has pushed out of a memory that is too small
    for both. Where runs are long there are fewer of them.
    """
    best, begin = [math.inf] * len(runs), time.perf_counter()
    for _ in range(2):
        for number, run in enumerate(runs):
            again = 1 if timed(run) > LONG else 2
            best[number] = min(best[number], *(timed(run) for _ in range(again)))
        if time.perf_counter() - begin > ENOUGH:
            break
    return best


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    result = run()
    if isinstance(result, Tensor) and result.is_cuda:
        torch.cuda.synchronize(result.device)
    return time.perf_counter() - start

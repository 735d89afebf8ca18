"""A run: the steps of each part that are not in the file, one after the other, until the time is over."""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.device.file import DeviceResults, PartRecord
from benchmarks.device.parts import PARTS
from benchmarks.device.place import Place
from benchmarks.device.step import Outcome, Step

Report = Callable[[str, PartRecord], None]


def run(
    names: Sequence[str],
    place: Place,
    results: DeviceResults,
    *,
    minutes: float = 8.0,
    path: Path | None = None,
    report: Report = lambda name, part: None,
) -> DeviceResults:
    """Do what is missing. Steps that failed are made again.

    Args:
        names: of parts.
        place: the device.
        results: what is known; it is added to.
        minutes: no step is begun that would not be over by then, if it took as long as is expected of it, or as the longest of
            its part so far.
        path: the file that is written after each step.
        report: called after each part.
    """
    end = time.monotonic() + 60 * minutes
    made_with = _made_with(results.environment)
    for name in names:
        part = results.parts.setdefault(name, PartRecord())
        if not part.complete and part.made_with != made_with:  # numbers of two versions make no table
            part.steps.clear()
        if not part.steps:
            part.made_with = made_with
        part.complete = True
        for step in PARTS[name].steps(place):
            known = part.steps.get(step.name)
            if known is not None and not known.failures:
                continue
            longest = max((outcome.seconds for outcome in part.steps.values()), default=0.0)
            if time.monotonic() + max(longest, step.expected) > end:
                part.complete = False
                break
            part.steps[step.name] = _made(step, place)
            if path is not None:
                results.save(path)
        if path is not None:
            results.save(path)
        report(name, part)
    return results


def _made(step: Step, place: Place) -> Outcome:
    begin = time.perf_counter()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            outcome = step.run()
            place.wait()
        except Exception as error:  # one row is lost, not the run
            said = f"{type(error).__name__}: {error}".strip().splitlines() or [""]
            outcome = Outcome(failures=[said[0] if len(said) == 1 else f"{said[0]} … {said[-1]}"])
    outcome.seconds = time.perf_counter() - begin
    # JSON has no infinity and no NaN.
    outcome.cells = {
        k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in outcome.cells.items()
    }
    gc.collect()
    if place.real:
        torch.cuda.empty_cache()
    return outcome


def _made_with(environment: dict[str, Any]) -> dict[str, Any]:
    return {name: environment[name] for name in ("curvalg", "torch", "python", "device")}

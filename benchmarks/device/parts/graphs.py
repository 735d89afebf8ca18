"""Products that are captured once and replayed: the same bits as without, and their seconds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.device.place import Place
from benchmarks.device.step import Outcome, Step
from benchmarks.device.workloads import draw, given, same_bits
from benchmarks.effort import EFFORTS
from benchmarks.peers.curvalg import matrix
from benchmarks.questions import PRODUCTS
from benchmarks.timing import Entrant, race, stopwatch
from curvalg import Problem

MODELS = {True: ("small MLP", "MLP", "CNN", "GPT 5M"), False: ("tiny", "tiny CNN")}
"""On a GPU, and elsewhere."""


def capturing() -> bool:
    """Whether this version of curvalg captures products."""
    return "graphs" in inspect.signature(Problem).parameters


def steps(place: Place) -> Iterator[Step]:
    for model in MODELS[place.real]:
        for question in PRODUCTS:
            yield Step(f"{question}, {model}", partial(_raced, place, model, question))


def _raced(place: Place, model: str, question: str) -> Outcome:
    if not capturing():
        return Outcome(skipped="Problem of this version takes no graphs=")
    if not place.device.startswith("cuda"):
        return Outcome(skipped="a CPU captures no graphs")
    there = given(model, batches=1).to(place, torch.float32)

    def multiply(graphs: bool) -> Callable[[], Tensor]:
        # The clock chooses nothing, so that both ways are made of the same operations.
        problem = there.problem(graphs=graphs, factored=False, columns="loop")
        op, v = matrix(question).lower(problem), draw(problem.size).to(there.device, problem.dtype)
        return lambda: op @ v

    runs = {"eager": multiply(False), "captured": multiply(True)}
    values = {}
    for label, run in runs.items():
        for _ in range(5):  # a product is captured after some
            values[label] = run().clone()
    watch = stopwatch(place.device)
    first = {label: watch(run)[0] for label, run in runs.items()}
    effort = replace(EFFORTS["quick"], rounds=50, seconds=0.5 if place.real else 0.05)
    times = race({label: Entrant(run, 34) for label, run in runs.items()}, first, effort, place.device)
    medians = {label: sorted(values)[len(values) // 2] for label, values in times.items()}
    same = same_bits(place, values["eager"], values["captured"])
    seconds = {f"{label}, ms": 1e3 * value for label, value in medians.items()}
    speed = {"times as fast": medians["eager"] / medians["captured"], "same bits": "yes" if same else "no"}
    outcome = Outcome({"question": question, "model": model, **seconds, **speed})
    later = same_bits(place, runs["captured"](), values["captured"])
    outcome.need(same, "the captured product has other bits than the eager one")
    outcome.need(later, "a later replay has other bits than the first")
    return outcome

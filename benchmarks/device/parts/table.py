"""Products, inverses, eigenvalues and densities beside other libraries, in multiples of one gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks.cases import CASES
from benchmarks.device.place import Place
from benchmarks.device.step import Outcome, Step
from benchmarks.effort import EFFORTS, Effort, Sizes
from benchmarks.peers import available, names
from benchmarks.peers.base import Peer
from benchmarks.questions import PRODUCTS
from benchmarks.results import Record, Results, Task
from benchmarks.session import Session, quiet
from benchmarks.workload import fair_attention

LARGE = ("GPT 5M", "GPT-2 124M", "ResNet-50", "CNN", "MLP", "small MLP")
"""Models on a GPU, the most telling first."""
SMALL = ("small MLP", "tiny CNN", "tiny LM")
"""On a CPU."""
TINY = ("tiny", "tiny CNN")
"""On the simulated device."""
SIZES = Sizes(eigenvalues=5, tol=1e-2, probes=2, steps=20)
SPECTRA = ("eigenvalues", "density")
LONG = ("GPT-2 124M", "ResNet-50")
"""Models whose eigenvalues take the peers minutes."""
COMPILED = "compiled"
"""The case of curvlinops with compiled products, which takes long to compile: its rows come late."""
COMPILED_MODELS = {True: ("GPT 5M", "MLP"), False: ("small MLP",)}
"""On a GPU, and on a CPU."""
EXPECTED = {COMPILED: 60.0, "spectra": 120.0}
"""Seconds that are left for rows of compiled products, and for spectra of large models."""


def models(place: Place) -> tuple[str, ...]:
    """Of a place."""
    return TINY if place.simulated else LARGE if place.real else SMALL


def tasks(place: Place) -> Iterator[Task]:
    """The most valuable first, for a run that is cut."""
    chosen = models(place)
    for question in PRODUCTS:
        for model in chosen:
            yield Task("products", question, model)
    for question in ("kfac inverse", "kfac inverse again"):
        for model in chosen:
            yield Task("matrices", question, model)
    for question in ("hessian", "ggn"):
        for model in chosen:
            yield Task("columns", question, model, 16)
    for question in SPECTRA:
        for model in chosen:
            if model not in LONG:
                yield Task("spectra", question, model)
    for question in ("covariance", "sum"):
        for model in chosen:
            yield Task("columns", question, model, 16)
    if not place.simulated:
        for question in ("ggn", "covariance", "hessian") if place.real else ("ggn",):
            for model in COMPILED_MODELS[place.real]:
                yield Task(COMPILED, question, model)
    for question in SPECTRA:
        for model in chosen:
            if model in LONG:
                yield Task("spectra", question, model)


def steps(place: Place) -> Iterator[Step]:
    effort = _effort(place)
    for task in tasks(place):
        long = task.case == COMPILED or task.model in LONG
        yield Step(str(task), partial(_measured, place, task, effort), EXPECTED.get(task.case, 0.0) if long else 0.0)


def _effort(place: Place) -> Effort:
    if not place.real:
        return replace(EFFORTS["quick"], sizes=replace(SIZES, eigenvalues=2, probes=1, steps=5), seconds=0.1, rounds=3)
    # A contestant whose first run takes far longer than the patience is not run again.
    return replace(EFFORTS["default"], sizes=SIZES, seconds=0.5, rounds=15, patience=1.0)


def contestants(task: Task) -> tuple[list[Peer], dict[str, str]]:
    """Who takes part, and why others cannot."""
    peers, missing = available(names())
    if task.case != COMPILED:
        return peers, missing
    from benchmarks.device.compiled_curvlinops import CompiledCurvlinops

    return [peer for peer in peers if peer.name in ("curvalg", "curvlinops")] + [CompiledCurvlinops()], {}


def _measured(place: Place, task: Task, effort: Effort) -> Outcome:
    peers, missing = contestants(task)
    asked = replace(task, case="products") if task.case == COMPILED else task
    with quiet(), fair_attention():
        record = CASES[asked.case].measure(asked, Session(peers, effort, place.device))
    if task.case == COMPILED:
        torch.compiler.reset()  # releases what the compiled models keep
    return outcome_of(task, record, peers, missing)


def outcome_of(task: Task, record: Record, peers: list[Peer], missing: dict[str, str]) -> Outcome:
    """A row of the table: one gradient in milliseconds, and everybody's multiples of it."""
    gradient = record.median("gradient")
    columns = f", {task.columns} columns" if task.columns > 1 else ""
    what = "next" if task.question.endswith("again") else "first" if task.case == "matrices" else ""
    question = task.question.removesuffix(" again") + columns + (f", {what}" if what else "")
    cells = {"question": question, "model": task.model, "gradient, ms": None if gradient is None else 1e3 * gradient}
    ratios = {label: record.ratio(label) for label in record.values if label != "gradient"}
    results = Results({"contestants": {peer.name: peer.distribution for peer in peers}}, {}, missing, [record])
    notes = [check.note for _, label, check in results.notes() if label != "curvalg"]
    skipped = {label: why for label, why in record.skipped.items() if label != "curvalg"}
    notes += [f"{label} is left out: {why.splitlines()[0][:200]}" for label, why in skipped.items()]
    failures = [line.removeprefix(f"{record.task}: ") for line in results.failures()]
    return Outcome(cells | ratios, failures, [*notes, *missing.values()])

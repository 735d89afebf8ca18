"""How often the host waits for the device."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.device.allowed import WAITS
from benchmarks.device.place import SIMULATOR, Place
from benchmarks.device.step import Outcome, Step
from benchmarks.device.workloads import Given, draw, given
from curvalg import Identity, inverse, registry
from curvalg.estimate import eigsh, spectral_density

SETTLED = 40
"""Products after which nothing is chosen or tried any more."""
COUNTED = 5
SHORT, LONG = 10, 20
"""Iterations and steps of two runs, whose difference is counted: what begins and ends a run is not."""

Counter = Callable[[int], int]
"""Does something as long, SHORT or LONG, and says in how many units of it."""


def questions(there: Given) -> dict[str, Callable[[], Counter]]:
    """What is counted, by the names of ``WAITS``: each makes ready, and returns what is counted."""
    ggn, kfac = registry.build("ggn"), registry.build("kfac")

    def products(expr: Any) -> Counter:
        problem = there.problem()
        op, v = expr.lower(problem), draw(problem.size).to(there.device, problem.dtype)
        for _ in range(SETTLED):
            op @ v

        def run(length: int) -> int:
            for _ in range(length // SHORT * COUNTED):
                op @ v
            return length // SHORT * COUNTED

        return run

    def iterations() -> Counter:
        problem = there.problem()
        v = draw(problem.size).to(there.device, problem.dtype)

        def run(length: int) -> int:
            matrix = inverse(ggn + 1e-4 * Identity, solver="cg", rtol=1e-7, maxiter=length, on_fail="warn")
            return int(matrix.lower(problem).solve(v).iterations.max())

        for _ in range(SETTLED // LONG):
            run(LONG)
        return run

    def estimated(estimate: Callable[[Any, int], int]) -> Counter:
        problem = there.problem()
        op, v = registry.build("hessian").lower(problem), draw(problem.size).to(there.device, problem.dtype)
        for _ in range(SETTLED):
            op @ v
        estimate(op, LONG)
        return partial(estimate, op)

    return {
        "kept product, hessian": lambda: products(registry.build("hessian")),
        "kept product, ggn": lambda: products(ggn),
        "kept product, covariance": lambda: products(registry.build("covariance")),
        "cg, an iteration": iterations,
        "eigsh, a product": lambda: estimated(_eigenpairs),
        "density, a product": lambda: estimated(_density),
        "inverse(kfac)": lambda: products(inverse(kfac + Identity)),
        "inverse by the Gram matrix": lambda: products(inverse(ggn + Identity, solver="gram")),
    }


def steps(place: Place) -> Iterator[Step]:
    for question in WAITS:
        yield Step(question, partial(_counted, place, question))


def _counted(place: Place, question: str) -> Outcome:
    if not place.device.startswith("cuda"):
        return Outcome(skipped="a CPU waits for nobody")
    model = "MLP" if place.real else "small MLP"
    run, count = questions(given(model, batches=1).to(place, torch.float32))[question](), counted_on(place)
    place.wait()
    (waits, units, where), (fewer, begun, _) = count(lambda: run(LONG)), count(lambda: run(SHORT))
    waits, units = waits - fewer, units - begun
    each, allowed = waits / units, WAITS[question]
    cells = {"what": question, "times": units, "waits": waits, "waits each": each, "allowed": allowed}
    outcome = Outcome({**cells, "model": model}, notes=where)
    outcome.need(each <= allowed, f"{each:.2f} waits each, {allowed:g} allowed")
    return outcome


def counted_on(place: Place) -> Callable[[Callable[[], int]], tuple[int, int, list[str]]]:
    """What counts (waits, units, places) of something that is done."""
    return _by_watching if place.simulated else _by_warnings


def _by_warnings(run: Callable[[], int]) -> tuple[int, int, list[str]]:
    """Torch warns of each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            units = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [w for w in caught if "synchroniz" in str(w.message)]
    places: dict[str, int] = {}
    for warning in found:
        where = f"{'/'.join(warning.filename.split('/')[-2:])}:{warning.lineno}"
        places[where] = places.get(where, 0) + 1
    return len(found), units, [f"{number} at {where}" for where, number in places.items()]


def _by_watching(run: Callable[[], int]) -> tuple[int, int, list[str]]:
    """The simulated device counts; an upload that blocks is a wait."""
    with sys.modules[SIMULATOR].watch("curvalg", "curvalg_plugins") as seen:
        units = run()
    found = {key: number for key, number in seen.items() if key[0] in ("sync", "synchronize", "upload")}
    notes = [f"{number} {kind} ({name}) at {where}" for (kind, name, where), number in found.items()]
    return sum(found.values()), units, notes


def _density(op: Any, length: int) -> int:
    spectral_density(op, probes=2, steps=length)
    return 2 * length


def _eigenpairs(op: Any, length: int) -> int:
    return eigsh(op, length // 5, block=1).products

"""The same bits from run to run, and where a run is resumed from its checkpoint."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.device.interruption import Interruption, OperationCount
from benchmarks.device.parts.graphs import capturing
from benchmarks.device.place import Place
from benchmarks.device.step import Outcome, Step
from benchmarks.device.workloads import Given, draw, given, same_bits
from benchmarks.peers.curvalg import matrix
from benchmarks.questions import PRODUCTS
from curvalg import Identity, inverse, registry
from curvalg.estimate import eigsh, spectral_density, trace

MODELS = ("tiny", "tiny CNN", "tiny attention")
FIXED: dict[str, Any] = {"columns": "loop", "factored": False}
"""Nothing that a clock chooses."""
MODES: dict[str, dict[str, Any]] = {"kept": {}, "fresh": {"cache": 0}, "captured": {"graphs": True}}


@contextmanager
def deterministic() -> Iterator[None]:
    """Kernels that add in one order, as far as torch has them."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


RESUMED_MODEL = "small MLP"
"""Large enough that nothing is found by way of a dense matrix."""
RESUMED: dict[str, Callable[[Any, Path], Tensor]] = {
    "eigsh": lambda op, path: eigsh(op, 2, which="LA", tol=1e-4, block=1, checkpoint=path).eigenvectors,
    "trace": lambda op, path: torch.tensor(trace(op, products=8, method="hutchinson", checkpoint=path).value),
    "density": lambda op, path: spectral_density(op, probes=2, steps=6, checkpoint=path).nodes,
}
"""An answer of an operator, with a checkpoint."""


def steps(place: Place) -> Iterator[Step]:
    for mode in MODES:
        for model in MODELS:
            yield Step(f"{mode}, {model}", partial(_repeated, place, model, mode))
    for name in (*RESUMED, "cg"):
        for mode in ("kept", "captured"):
            yield Step(f"resumed {name}, {mode}", partial(_resumed, place, name, mode))


def _repeated(place: Place, model: str, mode: str) -> Outcome:
    if mode == "captured" and not capturing():
        return Outcome(skipped="Problem of this version takes no graphs=")
    outcome = Outcome({"what": f"two runs of 6 products, {mode}", "model": model})
    there = given(model, batches=2).to(place, torch.float32)
    with deterministic():
        for question in PRODUCTS:
            first, second = (_products(there, question, MODES[mode]) for _ in range(2))
            outcome.need(same_bits(place, first, second), f"{question} has other bits in the second run")
            outcome.need(
                same_bits(place, first, first[:1].expand_as(first)), f"{question} has other bits in a later product"
            )
    return outcome


def _products(there: Given, question: str, options: dict[str, Any]) -> Tensor:
    problem = there.problem(**FIXED, **options)
    op, v = matrix(question).lower(problem), draw(problem.size).to(there.device, problem.dtype)
    return torch.stack([op @ v for _ in range(6)]).cpu()


def _resumed(place: Place, name: str, mode: str) -> Outcome:
    """Interrupted half way by what Ctrl-C raises, and called again."""
    if mode == "captured" and not capturing():
        return Outcome(skipped="Problem of this version takes no graphs=")
    there = given(RESUMED_MODEL, batches=2).to(place)

    def answer(path: Path) -> Tensor:
        problem = there.problem(**FIXED, **MODES[mode])
        if name == "cg":
            damped = inverse(registry.build("ggn") + 1e-2 * Identity, solver="cg", rtol=1e-8).lower(problem)
            solved: Tensor = damped.solve(draw(problem.size).to(there.device), checkpoint=path).x
            return solved
        return RESUMED[name](registry.build("hessian").lower(problem), path)

    with tempfile.TemporaryDirectory() as folder, deterministic():
        counting = OperationCount()
        with counting:
            expected = answer(Path(folder) / "whole.safetensors")
        interrupted, tried = None, 0
        path = Path(folder) / "run.safetensors"
        for share in (0.6, 0.75, 0.9):  # before the first complete step there is nothing to go on from
            interruption = Interruption(int(share * counting.number), KeyboardInterrupt)
            tried += 1
            try:
                with interruption:
                    answer(path)
            except KeyboardInterrupt:
                continue
            finally:
                interrupted = interruption.raised
            if path.exists():
                break
        left = path.exists()
        found = answer(path)
    outcome = Outcome({"what": f"{name}, interrupted and resumed, {mode}", "model": RESUMED_MODEL})
    outcome.need(bool(interrupted), "the run was over before it was interrupted")
    if not left:
        outcome.skipped = "it was interrupted where no file is written"
    outcome.need(same_bits(place, found, expected), "the resumed run has other bits")
    return outcome

"""What is kept stays within the budget, and a product that ran out of memory is right the next time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.device.interruption import Interruption, OperationCount
from benchmarks.device.place import Place
from benchmarks.device.step import Outcome, Step
from benchmarks.device.workloads import Given, draw, given, scaled_error
from benchmarks.peers.curvalg import matrix
from curvalg import Problem

MODELS = {True: "MLP", False: "tiny"}
"""On a GPU, and elsewhere."""
MIB = 2**20
BUDGETS: tuple[str | int, ...] = ("auto", 0, 8 * MIB, 64 * MIB)
SLACK = 2 * MIB
"""Bytes of problems apart from what the budget is for: state, counts, and rounding of the allocator."""
ROOM = 2 * 2**30
"""Bytes that a filler leaves free."""
KEEPERS = 2
"""Problems with ``cache="auto"``; each takes a quarter of what is free at most, so that half is left to the user."""
BOUND = 1e-5
NO_ALLOCATOR = "only a GPU's allocator tells what is kept, and can be filled"


def steps(place: Place) -> Iterator[Step]:
    for budget in BUDGETS:
        yield Step(f"cache={budget!r}", partial(_within_budget, place, budget))
    for share in (0.2, 0.5, 0.8):
        yield Step(f"out of memory at {share:.0%} of a product", partial(_interrupted, place, share))
    yield Step("out of memory by a limit", partial(_limited, place))
    yield Step("out of memory by a filler", partial(_filled, place))
    yield Step("room for others", partial(_room_for_others, place))


def _given(place: Place) -> Given:
    return given(MODELS[place.real], batches=2).to(place, torch.float32)


def _product(problem: Problem) -> Tensor:
    product: Tensor = matrix("hessian").lower(problem) @ draw(problem.size).to(problem.device, problem.dtype)
    return product


def _within_budget(place: Place, budget: Any) -> Outcome:
    there = _given(place)
    expected = _product(there.problem(cache=0))
    outcome = Outcome({"what": f"kept with cache={budget!r}"})
    with _allocated(place) as bytes_of:
        problem = there.problem(cache=budget)
        limit = torch.cuda.mem_get_info()[0] // 4 if budget == "auto" and place.real else budget
        op, v = matrix("hessian").lower(problem), draw(problem.size).to(place.device, torch.float32)
        for _ in range(3):
            found = op @ v
        found = found.clone()
        kept, peak = bytes_of()
    error = scaled_error(found, expected)
    outcome.need(error <= BOUND, f"the product is off by {error:.1e}")
    outcome.cells |= {"relative error": error}
    if not place.real:
        outcome.notes.append(NO_ALLOCATOR)
        return outcome
    outcome.cells |= {"kept, MiB": kept / MIB, "peak, MiB": peak / MIB, "allowed, MiB": limit / MIB}
    vectors = 3 * v.numel() * v.element_size() + sum(p.numel() * 4 for p in there.model.parameters())
    outcome.need(kept <= limit + vectors + SLACK, f"{kept / MIB:.1f} MiB are kept of {limit / MIB:.1f} allowed")
    return outcome


@contextmanager
def _allocated(place: Place) -> Iterator[Any]:
    """A function that gives bytes allocated since then: now, and at the most."""
    if not place.real:
        yield lambda: (0, 0)
        return
    place.wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield lambda: (torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before)


def _interrupted(place: Place, share: float) -> Outcome:
    """Planted at an operation: a fresh problem raises, and afterwards gives what another one gives."""
    there = _given(place)
    with OperationCount() as counted:
        expected = _product(there.problem())
    problem = there.problem()
    op, v = matrix("hessian").lower(problem), draw(problem.size).to(place.device, torch.float32)
    outcome = Outcome({"what": f"out of memory at {share:.0%} of a first product"})
    interruption = Interruption(max(1, int(share * counted.number)), torch.OutOfMemoryError)
    with interruption:
        found = _attempted(op, v, outcome)
    outcome.need(interruption.raised, "nothing was interrupted")
    if found is not None:
        outcome.need(scaled_error(found, expected) <= BOUND, "the product that ran out of memory is wrong")
    return _right_afterwards(outcome, op @ v, expected)


def _attempted(op: Any, v: Tensor, outcome: Outcome) -> Tensor | None:
    """A product that may run out of memory, which the user is told in one way or another; None where it did."""
    try:
        product: Tensor = op @ v
    except Exception as error:
        reason: BaseException | None = error
        while reason is not None and not isinstance(reason, torch.OutOfMemoryError):
            reason = reason.__cause__ or reason.__context__
        if reason is None:
            raise
        outcome.notes.append(f"told by {type(error).__name__}")
        return None
    outcome.notes.append("the product was given all the same, in another way or in what was left")
    return product


def _right_afterwards(outcome: Outcome, found: Tensor, expected: Tensor) -> Outcome:
    error = scaled_error(found, expected)
    outcome.cells |= {"relative error": error}
    outcome.need(error <= BOUND, f"the product after it is off by {error:.1e}")
    return outcome


def _limited(place: Place) -> Outcome:
    """By ``torch.cuda.set_per_process_memory_fraction``."""
    if not place.real:
        return Outcome(skipped=NO_ALLOCATOR)
    there = _given(place)
    expected = _product(there.problem())
    problem = there.problem()
    op, v = matrix("hessian").lower(problem), draw(problem.size).to(place.device, torch.float32)
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    outcome = Outcome({"what": "a limit that a product does not fit into"})
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + MIB) / total)
    try:
        _attempted(op, v, outcome)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return _right_afterwards(outcome, op @ v, expected)


def _filled(place: Place) -> Outcome:
    """By a tensor that takes all but little."""
    if not place.real:
        return Outcome(skipped=NO_ALLOCATOR)
    there = _given(place)
    expected = _product(there.problem())
    problem = there.problem()
    op, v = matrix("hessian").lower(problem), draw(problem.size).to(place.device, torch.float32)
    outcome = Outcome({"what": "a filler that leaves a MiB"})
    torch.cuda.empty_cache()
    filler = torch.empty(max(0, torch.cuda.mem_get_info()[0] - 64 * MIB), dtype=torch.uint8, device=place.device)
    rest: list[Tensor] = []
    try:
        while True:  # what torch holds in reserve, and what is left
            rest.append(torch.empty(MIB, dtype=torch.uint8, device=place.device))
    except torch.OutOfMemoryError:
        del rest[:1]
    _attempted(op, v, outcome)
    del filler
    rest.clear()
    return _right_afterwards(outcome, op @ v, expected)


def _room_for_others(place: Place) -> Outcome:
    """Several problems keep what they may, and a user's tensor still fits."""
    if not place.real:
        return Outcome(skipped=NO_ALLOCATOR)
    outcome = Outcome({"what": f"a quarter of {ROOM // MIB} MiB beside {KEEPERS} problems"})
    filler = torch.empty(max(0, torch.cuda.mem_get_info()[0] - ROOM), dtype=torch.uint8, device=place.device)
    width, rows = 512, 2**14
    net = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.Tanh()) for _ in range(2)))
    data = (torch.randn(rows, width, device=place.device), torch.randint(0, width, (rows,), device=place.device))
    keepers = [Problem(net.to(place.device), torch.nn.CrossEntropyLoss(), data) for _ in range(KEEPERS)]
    with _allocated(place) as bytes_of:
        for problem in keepers:
            _product(problem)
        outcome.cells |= {"kept, MiB": bytes_of()[0] / MIB}
    try:
        torch.empty(ROOM // 4, dtype=torch.uint8, device=place.device)
    except torch.OutOfMemoryError as error:
        outcome.failures.append(f"the user's tensor does not fit: {str(error).splitlines()[0]}")
    del filler
    return outcome

"""What a second process is worth: ``python -m benchmarks.ranks``.

Two processes of one group, on one thread each, hold half of the batches each; the first of them also holds a problem of all
batches, for itself. Both are run in turns, so that a machine that drifts hits both alike, and their results are compared before
anything is timed. Efficiency is t(one process, all batches) / (W t(W processes, their parts)): 1 where no time is lost.

Processes on one machine share its memory and its last cache, which is no fault of a group. So every process also has a problem
of its own part that knows nothing of the others; all of these run at the same time, and their efficiency, with nothing
exchanged, is the ceiling of this machine. Efficiency divided by the ceiling is what exchanges leave of it.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor

from benchmarks.effort import Sizes
from benchmarks.launch import in_group, launched, shown
from benchmarks.session import quiet
from benchmarks.workload import Batches, Workload, build, fair_attention
from curvalg import Problem, registry
from curvalg.estimate import spectral_density

BLOCK = "ranks"
"""The markers around the table of a page."""
SECONDS = 15.0
"""After which no further round of a row begins."""
SETTLE = 24
"""Products before the first that is timed: by then what is kept was chosen."""

Make = Callable[..., Problem]
Run = Callable[[], tuple[Tensor, Problem]]


@dataclass(frozen=True)
class Question:
    """A row.

    Args:
        prepare: of what makes a problem and of a vector, what is run; it gives a result and the problem that exchanged it.
        settle: runs before the first that is timed.
    """

    prepare: Callable[[Make, Tensor], Run]
    settle: int = 1


def _product(term: str, **options: Any) -> Callable[[Make, Tensor], Run]:
    def prepare(make: Make, vector: Tensor) -> Run:
        problem = make(**options)
        op = registry.build(term).lower(problem)
        return lambda: (op @ vector, problem)

    return prepare


def _kfac(make: Make, vector: Tensor) -> Run:
    def run() -> tuple[Tensor, Problem]:
        problem = make()
        return registry.build("kfac").lower(problem) @ vector, problem

    return run


def _density(make: Make, vector: Tensor) -> Run:
    problem = make()
    hessian = registry.build("hessian").lower(problem)
    return lambda: (spectral_density(hessian, probes=4, steps=10).nodes, problem)


QUESTIONS = {
    "Hessian product": Question(_product("hessian"), SETTLE),
    "Hessian product, nothing kept": Question(_product("hessian", cache=0), 2),
    "GGN product": Question(_product("ggn"), SETTLE),
    "GGN product, nothing kept": Question(_product("ggn", cache=0), 2),
    "KFAC, built and multiplied once": Question(_kfac),
    "density of the Hessian, 4 × 10 products": Question(_density),
}


def _batches(workload: Workload, count: int) -> Batches:
    """So many batches of the model's size: its rows, in other places of each."""
    ((X, y),) = workload.data
    return [(X.roll(i, 0), y.roll(i, 0)) for i in range(count)]


def measured(model: str, batches: int, question: str, rounds: int) -> dict[str, Any]:
    """One row, on all ranks of the group of all processes; each gets it."""
    workload, asked = build(model, Sizes()), QUESTIONS[question]
    data, rank, size = _batches(workload, batches), dist.get_rank(), dist.get_world_size()
    own = data[rank * batches // size : (rank + 1) * batches // size]

    def problem(of: Batches, group: Any) -> Make:
        return lambda **options: Problem(workload.model, workload.loss, of, group=group, **options)

    alone = asked.prepare(problem(data, None), workload.vector) if rank == 0 else None
    shared = asked.prepare(problem(own, dist.group.WORLD), workload.vector)
    strangers = asked.prepare(problem(own, None), workload.vector)
    difference, before = _settled(asked.settle, alone, shared, strangers)
    times: dict[str, list[float]] = {"one": [], "strangers": [], "many": []}
    for _ in range(rounds):
        for who, run in (("one", alone), ("strangers", strangers), ("many", shared)):
            times[who].append(_seconds(run))
        if sum(map(sum, times.values())) > SECONDS:  # all ranks have the same times
            break
    one, apart, many = (statistics.median(seconds) for seconds in times.values())
    exchanged = _exchanged(before, shared)
    return {
        "model": model,
        "batches": batches,
        "question": question,
        "processes": size,
        "one": one,
        "many": many,
        "efficiency": one / (size * many),
        "ceiling": one / (size * apart),
        "difference": difference,
        **exchanged,
    }


def _settled(runs: int, alone: Run | None, shared: Run, strangers: Run) -> tuple[float, Problem]:
    """Make the runs that come before those that are timed; the relative difference of the results, and whose they are."""
    for _ in range(runs):
        expected = alone()[0] if alone is not None else None
        dist.barrier()  # strangers choose their ways as they will run: all at the same time
        strangers()
        got, problem = shared()
    found = [None if expected is None else float((got - expected).norm() / expected.norm())]
    dist.broadcast_object_list(found)
    assert found[0] is not None
    if found[0] > 1e-3:
        raise ValueError(f"{dist.get_world_size()} processes compute something else: they differ by {found[0]:.1g}")
    return found[0], problem


def _seconds(run: Run | None) -> float:
    """Of the slowest rank, which all begin together; None: nothing is done on this rank."""
    dist.barrier()
    start = time.perf_counter()
    if run is not None:
        run()
    spent = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent)


def _exchanged(before: Problem, run: Run) -> dict[str, int]:
    """Headers, payloads and bytes of one run, with those of making its problem where it makes one."""
    kinds = ("headers", "payloads", "bytes")
    counts = {kind: getattr(before.group, kind) for kind in kinds}
    after = run()[1]
    return {kind: getattr(after.group, kind) - (counts[kind] if after is before else 0) for kind in kinds}


def _measure_all(order: dict[str, Any], to: Path) -> None:
    """What each process does: all rows, which the first one writes."""
    rows = []
    with quiet(), fair_attention():
        for model, batches, question in _all(order):
            rows.append(measured(model, batches, question, order["rounds"]))
            if dist.get_rank() == 0:
                to.write_text(json.dumps(rows))
                print(json.dumps(rows[-1]), flush=True)


def _all(order: dict[str, Any]) -> Iterator[tuple[str, int, str]]:
    for model in order["models"]:
        for batches in order["batches"]:
            for question in order["questions"]:
                yield model, batches, question


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row a question."""
    lines = [
        "| model | batches | what | processes | seconds, one | seconds, all "
        "| efficiency | ceiling | headers | payloads | bytes |",
        "|---" * 11 + "|",
    ]
    for row in rows:
        cells = [row["model"], row["batches"], row["question"], row["processes"]]
        cells += [f"{row['one']:.3g}", f"{row['many']:.3g}", f"{row['efficiency']:.2f}", f"{row['ceiling']:.2f}"]
        cells += [row["headers"], row["payloads"], row["bytes"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(
    models: Annotated[str, typer.Option(metavar="A,B", help="Names of benchmarks/models.py.")] = "MLP,CNN,GPT",
    batches: Annotated[
        str, typer.Option(metavar="A,B", help="Numbers of batches, each as large as a model's data.")
    ] = "8,16",
    questions: Annotated[str, typer.Option(metavar="A;B", help="Rows, separated by semicolons.")] = ";".join(QUESTIONS),
    processes: Annotated[int, typer.Option(min=2, help="Processes of the group, one thread each.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each, in turns; medians are shown.")] = 7,
    json_: Annotated[Path | None, typer.Option("--json", help="Write rows and environment to this file.")] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="PAGE", help=f"Write the table between its <!-- {BLOCK} -->.")
    ] = None,
    order: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure the efficiency of several processes against one."""
    if order is not None:
        asked = json.loads(order)
        in_group(partial(_measure_all, asked, Path(asked["to"])))
        return
    asked = {
        "models": models.split(","),
        "batches": [int(number) for number in batches.split(",")],
        "questions": questions.split(";"),
        "rounds": rounds,
    }
    rows = launched("benchmarks.ranks", asked, processes)
    shown(rows, table(rows), BLOCK, json_, write)


if __name__ == "__main__":
    typer.run(main)

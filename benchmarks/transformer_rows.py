"""Models of transformers, one row for each matrix, each in a process of its own: ``python -m benchmarks.transformer_rows``.

Times and peaks of memory are in those of a gradient of the same loss on the same data, in the same process. Errors are of
products in float64 against textbook code in plain torch. Kronecker factors, their eigenbases and diagonals are compared with
hooks and with assembled gradients by ``make test-models``.
"""

from __future__ import annotations

import ctypes.util
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks.effort import Sizes
from benchmarks.environment import describe
from benchmarks.models import MODELS
from benchmarks.peak import HostPeak
from benchmarks.peers import load
from benchmarks.peers.torch_by_hand import TorchByHand
from benchmarks.readme import with_block
from benchmarks.session import quiet
from benchmarks.timing import stopwatch
from benchmarks.workload import Workload, build, fair_attention
from curvalg import Expr, Identity, Problem, inverse, registry
from curvalg_plugins.kronecker import damp_factors

NAMES = [name for name, model in MODELS.items() if model.group == "library" and "124M" not in name]
WARM = "tiny HF GPT-2"
"""Brings in what a process does once, before anything is timed."""
BLOCK = "transformers"
"""The markers around the table of a page."""
ROUNDS, SECONDS = 5, 8.0
"""The most rounds of a way, and seconds after which no further one begins."""
HIDDEN = 8192
"""Rows of a table whose factor is larger than the model."""


@dataclass(frozen=True)
class Matrix:
    """A row.

    Args:
        make: the expression, for a problem.
        judge: the question to textbook code; None where there is none of a few lines.
        parts: whether shares of parameters with factors are told.
        kept: whether what is recorded may be kept, so that a product has two times.
    """

    make: Callable[[Problem], Expr]
    judge: str | None = None
    parts: bool = False
    kept: bool = True


def _damped(problem: Problem) -> Expr:
    return inverse(damp_factors(registry.build("kfac", fisher="mc", rest="diagonal").bound(problem), 1e-3), check=False)


MATRICES = {
    "hessian": Matrix(lambda _: registry.build("hessian"), "hessian"),
    "ggn": Matrix(lambda _: registry.build("ggn"), "ggn"),
    "covariance": Matrix(lambda _: registry.build("covariance"), "covariance"),
    "kfac, drawn": Matrix(lambda _: registry.build("kfac", fisher="mc", rest="diagonal"), parts=True, kept=False),
    "ekfac, drawn": Matrix(lambda _: registry.build("ekfac", fisher="mc", rest="diagonal"), parts=True, kept=False),
    "diagonal of the ggn, drawn": Matrix(lambda _: registry.build("ggn_diagonal", samples=1), kept=False),
    "diagonal of the covariance": Matrix(lambda _: registry.build("covariance_diagonal"), kept=False),
    "inverse of kfac, factors damped": Matrix(_damped, kept=False),
    "inverse of kfac, damped exactly": Matrix(
        lambda _: inverse(registry.build("kfac", fisher="mc", rest="diagonal") + 1e-3 * Identity), kept=False
    ),
}
OTHERS = {
    f"{question} by {peer}": (peer, question)
    for question in ("hessian", "ggn")
    for peer in ("torch_by_hand", "hessian_eigenthings", "curvlinops")
}
"""Rows of other libraries: products alone."""


def row(model: str, matrix: str, threads: int) -> dict[str, Any]:
    """One row, measured in this process."""
    torch.set_num_threads(threads)
    with quiet(), fair_attention():
        for name in (WARM, model):
            workload = build(name, Sizes())
            with workload.closing:
                result = (
                    _of_peer(workload, *OTHERS[matrix]) if matrix in OTHERS else _of_matrix(workload, MATRICES[matrix])
                )
    return {"model": model, "matrix": matrix, **result}


def _gradient(workload: Workload) -> Callable[[], Tensor]:
    run = TorchByHand().prepare("gradient", workload)
    assert run is not None
    return run


def _of_peer(workload: Workload, peer: str, question: str) -> dict[str, Any]:
    gradient, watch, gauge = _gradient(workload), stopwatch("cpu"), HostPeak()
    own = _peak(gauge, gradient)
    run = load(peer).prepare(question, workload)
    if run is None:
        return {"reason": "no answer"}
    first = watch(run)[0]
    peak = _peak(gauge, run)
    seconds, unit = _alternating(watch, run, gradient)
    return {"gradient_seconds": unit, "first": first / unit, "fresh": seconds / unit, "peak": peak / own}


def _of_matrix(workload: Workload, matrix: Matrix) -> dict[str, Any]:
    gradient, watch, gauge = _gradient(workload), stopwatch("cpu"), HostPeak()
    own = _peak(gauge, gradient)
    found: dict[str, Any] = {"parameters": workload.size, "gradient_bytes": own}

    def problem(**options: Any) -> Problem:
        return Problem(workload.model, workload.loss, workload.data, **options)

    def product(on: Problem) -> Callable[[], Tensor]:
        op = matrix.make(on).lower(on)
        return lambda: op @ workload.vector

    made: list[Callable[[], Tensor]] = []

    def first() -> Tensor:
        made.append(product(problem()))
        return made[0]()

    before = _forgotten(gauge)
    found["first"] = watch(first)[0]
    found["peak"] = (gauge.peak() - before) / own
    seconds, unit = _alternating(watch, made[0], gradient)
    found |= {"gradient_seconds": unit, "first": found["first"] / unit, "next": seconds / unit}
    made.clear()
    if matrix.kept:
        fresh = product(problem(cache=0))
        fresh()
        found["fresh peak"] = _peak(gauge, fresh) / own
        seconds, unit = _alternating(watch, fresh, gradient)
        found["fresh"] = seconds / unit
    if matrix.parts:
        found["share"] = _share(workload, problem())
    if matrix.judge is not None and workload.size < 10_000_000:
        found["error"] = _error(workload, matrix)
    return found


def _peak(gauge: HostPeak, run: Callable[[], Any]) -> int:
    before = _forgotten(gauge)
    run()
    return gauge.peak() - before


def _forgotten(gauge: HostPeak) -> int:
    """The bytes in use, once what was freed has gone back to the system: an allocator that keeps it hides a later peak."""
    gc.collect()
    if (library := ctypes.util.find_library("c")) is not None and hasattr(found := ctypes.CDLL(library), "malloc_trim"):
        found.malloc_trim(0)
    gauge.reset()
    return gauge.peak()


def _alternating(
    watch: Callable[[Callable[[], Tensor]], tuple[float, Tensor]],
    run: Callable[[], Tensor],
    gradient: Callable[[], Tensor],
) -> tuple[float, float]:
    """Median seconds of a run and of a gradient, in turns."""
    times: tuple[list[float], list[float]] = [], []
    for _ in range(ROUNDS):
        for found, what in zip(times, (run, gradient), strict=True):
            found.append(watch(what)[0])
        if sum(map(sum, times)) > SECONDS:
            break
    return statistics.median(times[0]), statistics.median(times[1])


def _share(workload: Workload, problem: Problem) -> float:
    """The share of the parameters with Kronecker factors, outside of tables that both ends of the model share."""
    blocks = registry.build("kfac", fisher="mc", rest="diagonal").lower(problem).structure
    tied = {
        name
        for name, p in workload.model.named_parameters()
        if sum(q is p for _, q in workload.model.named_parameters(remove_duplicate=False)) > 1
    }
    sizes = {name: p.numel() for name, p in workload.model.named_parameters() if name not in tied}
    with_factors = {name for block in blocks if block.kind in ("kronecker", "eigenbasis") for name in block.params}
    return sum(n for name, n in sizes.items() if name in with_factors) / sum(sizes.values())


def _error(workload: Workload, matrix: Matrix) -> float:
    """The relative error of a product in float64."""
    double = Workload(
        workload.name,
        workload.twin().double(),
        workload.loss,
        [(X.double() if X.is_floating_point() else X, y) for X, y in workload.data],
        workload.vectors.double(),
        workload.sizes,
    )
    problem = Problem(double.model, double.loss, double.data)
    got = matrix.make(problem).lower(problem) @ double.vector
    if matrix.judge == "covariance":
        expected = sum(double.rows * g * (g @ double.vector) for g in _shares(double))
    else:
        by_hand = TorchByHand().prepare(str(matrix.judge), double)
        assert by_hand is not None
        expected = by_hand()
    return float((got - expected).norm() / torch.as_tensor(expected).norm())


def _shares(workload: Workload) -> Iterator[Tensor]:
    """The gradient of every row's share of the mean loss."""
    total = sum(y.numel() for _, y in workload.data)
    for X, y in workload.data:
        for x, t in zip(X.split(1), y.split(1), strict=True):
            share = F.cross_entropy(workload.model(x), t, reduction="sum") / total
            yield torch.cat([g.reshape(-1) for g in torch.autograd.grad(share, workload.parameters)])


COLUMNS = {
    "share": "with factors",
    "error": "error, float64",
    "first": "first",
    "next": "next",
    "fresh": "fresh",
    "peak": "peak",
    "fresh peak": "peak, fresh",
}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row a matrix, a number a cell."""
    lines = ["| model | matrix | " + " | ".join(COLUMNS.values()) + " |", "|---" * (2 + len(COLUMNS)) + "|"]
    for entry in rows:
        cells = [_cell(key, entry[key]) if key in entry else "" for key in COLUMNS]
        note = [entry["reason"], *[""] * (len(COLUMNS) - 1)] if "reason" in entry else cells
        lines.append(f"| {entry['model']} | {entry['matrix']} | " + " | ".join(note) + " |")
    return "\n".join(lines)


def _cell(key: str, value: float) -> str:
    return f"{100 * value:.1f} %" if key == "share" else f"{value:.0e}" if key == "error" else f"{value:.2g}"


def main(
    models: Annotated[str, typer.Option(metavar="A,B", help=f"Of: {', '.join(NAMES)}, HF GPT-2 124M.")] = ",".join(
        NAMES
    ),
    matrices: Annotated[str, typer.Option(metavar="A;B", help="Rows, separated by semicolons.")] = ";".join(MATRICES),
    threads: Annotated[int, typer.Option(min=1)] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds after which a row is given up.")] = 600.0,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Add to this file; rows that it has are measured again.")
    ] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="PAGE", help=f"Write the table between its <!-- {BLOCK} -->.")
    ] = None,
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure rows of models of transformers, each in a process of its own."""
    if one is not None:
        print(json.dumps(row(*json.loads(one))))
        return
    rows = json.loads(json_.read_text())["rows"] if json_ is not None and json_.exists() else []
    for model in filter(None, models.split(",")):
        for matrix in filter(None, matrices.split(";")):
            found = _in_a_process(model, matrix, threads, timeout)
            rows = [r for r in rows if (r["model"], r["matrix"]) != (model, matrix)] + [found]
            typer.echo(json.dumps(found))
            if json_ is not None:
                environment = describe([], "cpu") | {"threads": threads}
                json_.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    if write is not None:
        write.write_text(with_block(write.read_text("utf-8"), BLOCK, table(rows)), encoding="utf-8")
    typer.echo(table(rows))


def _in_a_process(model: str, matrix: str, threads: int, timeout: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.transformer_rows", "--one", json.dumps([model, matrix, threads])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"model": model, "matrix": matrix, "reason": f"given up after {timeout:.0f} s"}
    if done.returncode:
        return {"model": model, "matrix": matrix, "reason": (done.stderr.strip().splitlines() or ["?"])[-1][:160]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    typer.run(main)

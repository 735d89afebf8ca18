"""What a rank holds of a model in parts: ``python -m benchmarks.shards``.

GPT-2 with 124M parameters (each block by ``fully_shard``, then the rest) on several processes of one machine, and whole on one.
The processes share a few sequences, one in each batch. Memory is resident, at its peak, net of what there was before the model.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn

from benchmarks.launch import in_group, launched, shown
from benchmarks.models import Transformer
from benchmarks.peak import HostPeak
from benchmarks.session import quiet
from curvalg import Problem, registry
from curvalg.estimate import spectral_density

BLOCK = "shards"
"""The markers around the table of a page."""
WORDS, STEPS = 50257, 6
MODELS = {"GPT-2 124M": (768, 12, 32), "small GPT": (64, 2, 16)}
"""Width, layers and tokens of a sequence."""


def _model(name: str, mesh: Any) -> nn.Module:
    width, layers, _ = MODELS[name]
    torch.manual_seed(0)
    model = Transformer(WORDS if width > 64 else 512, width=width, layers=layers, length=64, heads=width // 64)
    model.head.weight = model.embed.weight
    if mesh is None:
        return model
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _sequences(name: str, count: int) -> list[tuple[Tensor, Tensor]]:
    width, _, tokens = MODELS[name]
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(0, WORDS if width > 64 else 512, (count, tokens + 1), generator=generator)
    return [(row[None, :-1].contiguous(), row[None, 1:].contiguous()) for row in texts]


def measured(name: str, sequences: int, group: Any) -> list[dict[str, Any]]:
    """The rows of this process."""
    rank, size = (0, 1) if group is None else (dist.get_rank(), dist.get_world_size())
    gauge = HostPeak()
    gauge.reset()
    libraries = gauge.peak()
    mesh = None
    if group is not None:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (size,))
    model = _model(name, mesh)
    gc.collect()
    data = _sequences(name, sequences)[rank * sequences // size : (rank + 1) * sequences // size]
    problem = Problem(model, nn.CrossEntropyLoss(), data, group=mesh, samples="position", cache=0, columns="loop")
    hessian = registry.build("hessian").lower(problem)
    vector = torch.ones(problem.size) / problem.layout.whole.size**0.5
    questions: dict[str, Callable[[], Any]] = {
        "a gradient": problem.gradient,
        "a Hessian product": lambda: hessian @ vector,
        f"a density, {STEPS} steps": lambda: spectral_density(hessian, probes=1, steps=STEPS),
    }
    rows = []
    for question, answer in questions.items():
        answer()  # the first one swears the state in, with copies of its own
        gc.collect()
        gauge.reset()
        begin = time.perf_counter()
        answer()
        seconds = time.perf_counter() - begin
        rows.append(
            {
                "model": name,
                "processes": size,
                "question": question,
                "sequences": sequences,
                "parameters": problem.size,
                "of": problem.layout.whole.size,
                "bytes": gauge.peak() - libraries,
                "seconds": seconds,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row a question and number of processes; of a group the rank with most."""
    lines = ["| model | what | processes | numbers of a vector | MB, at the peak |", "|---" * 5 + "|"]
    for row in rows:
        cells = [
            row["model"],
            row["question"],
            row["processes"],
            f"{row['parameters']:,}",
            f"{row['bytes'] / 1e6:,.0f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _measure(order: dict[str, Any]) -> None:
    """What each process does; the first one writes, for each row, what the rank with most had."""
    alone = dist.get_world_size() == 1
    with quiet():
        own = measured(order["model"], order["sequences"], None if alone else dist.group.WORLD)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    if dist.get_rank() == 0:
        Path(order["to"]).write_text(json.dumps([max(same, key=_bytes) for same in zip(*every, strict=True)]))


def _bytes(row: dict[str, Any]) -> int:
    return int(row["bytes"])


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "GPT-2 124M",
    processes: Annotated[str, typer.Option(metavar="A,B", help="Numbers of processes, one thread each.")] = "1,2,4",
    sequences: Annotated[int, typer.Option(min=1, help="Of the data, of all processes together.")] = 4,
    json_: Annotated[Path | None, typer.Option("--json", help="Write rows and environment to this file.")] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="PAGE", help=f"Write the table between its <!-- {BLOCK} -->.")
    ] = None,
    order: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure what a rank holds of a model in parts."""
    if order is not None:
        in_group(partial(_measure, json.loads(order)))
        return
    asked = {"model": model, "sequences": sequences}
    rows = [row for count in processes.split(",") for row in launched("benchmarks.shards", asked, int(count))]
    shown(rows, table(rows), BLOCK, json_, write)


if __name__ == "__main__":
    typer.run(main)

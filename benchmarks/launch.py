"""Measurements by several processes: torchrun is started with an order, and rows come back in a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks.environment import describe
from benchmarks.readme import with_block

Rows = list[dict[str, Any]]


def launched(module: str, order: dict[str, Any], processes: int) -> Rows:
    """The rows that processes of one thread each measure: ``python -m module --order ...`` under torchrun."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "rows.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*launch, "-m", module, "--order", json.dumps({**order, "to": str(to)})]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        rows: Rows = json.loads(to.read_text())
    return rows


def in_group(measure: Callable[[], None]) -> None:
    """What each process does: measure on one thread in a group of all."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measure()
    dist.destroy_process_group()


def shown(rows: Rows, table: str, block: str, json_: Path | None, write: Path | None) -> None:
    """Print a table of rows; write them, with the environment, to a file, and the table into a page, where asked to."""
    if json_ is not None:
        environment = describe([], "cpu") | {"threads": 1}
        json_.parent.mkdir(parents=True, exist_ok=True)
        json_.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    if write is not None:
        write.write_text(with_block(write.read_text("utf-8"), block, table), encoding="utf-8")
    typer.echo(table)

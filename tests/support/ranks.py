"""Processes of one process group, which run functions of tests together; started once and used by many tests."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

MOST = 4
"""Processes of a pool; fewer are the first of them."""
PATIENCE = 60.0
"""Seconds after which an exchange is given up."""


BROKEN = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")
"""What an exchange says where its group is of no use any more."""


@dataclass(frozen=True)
class Failed:
    """What a rank raised.

    Args:
        kind: names of the class and its bases.
        message: of the exception.
        trace: for people.
    """

    kind: tuple[str, ...]
    message: str
    trace: str


def failed(error: BaseException) -> Failed:
    return Failed(tuple(c.__name__ for c in type(error).__mro__), str(error), traceback.format_exc())


def _serve(rank: int, world: int, store: str, patience: float, pipe: Connection) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    # A shell starts what it puts into the background deaf to Ctrl-C, and children inherit that: tests send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=patience)
    )
    groups = {world: dist.group.WORLD} | {size: dist.new_group(list(range(size))) for size in range(2, world)}
    while (order := pipe.recv()) is not None:
        function, size, args = order
        torch.manual_seed(0)
        try:
            pipe.send(function(groups[size], *args))
        except BaseException as error:
            pipe.send(failed(error))
        if torch.get_default_dtype() != torch.float32:
            torch.set_default_dtype(torch.float32)
    dist.destroy_process_group()


class Ranks:
    """A pool of processes.

    Args:
        world: their number.
        patience: seconds after which an exchange is given up.
    """

    def __init__(self, world: int = MOST, patience: float = PATIENCE) -> None:
        self._world, self._patience = world, patience
        self._start()

    def _start(self) -> None:
        world, patience = self._world, self._patience
        # Forked from one process that has imported the library, and no test: importing torch takes each some seconds.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["curvalg.estimate", "torch.distributed"])
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._pipes, self.processes = [], []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, store, patience, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self.processes.append(process)

    def run(self, size: int, function: Callable[..., Any], *args: Any, patience: float = PATIENCE) -> list[Any]:
        """What a function of a module, called with the group and arguments, returns on each rank, or :class:`Failed`."""
        results = []
        try:
            for pipe in self._pipes[:size]:
                pipe.send((function, size, args))
            for rank, pipe in enumerate(self._pipes[:size]):
                if not pipe.poll(patience):
                    raise TimeoutError(f"rank {rank} gives no answer")
                results.append(pipe.recv())
        except (TimeoutError, EOFError, OSError):  # a process hangs, or is gone: the next test gets others
            self._restart()
            raise
        if any(isinstance(r, Failed) and any(word in r.message for word in BROKEN) for r in results):
            self._restart()
        return results

    def _restart(self) -> None:
        for process in self.processes:
            process.kill()
        self._folder.cleanup()
        self._start()

    def close(self) -> None:
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except (BrokenPipeError, OSError):
                continue
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment() -> dict[str, str]:
    """The environment of a script of several processes."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2])])}

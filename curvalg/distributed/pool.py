"""Two processes of one process group, which run functions together; started when first asked, ended at exit."""

from __future__ import annotations

import atexit
import datetime
import functools
import pickle
import tempfile
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SIZE = 2
PATIENCE = 60.0
"""Seconds after which an exchange is given up; the answer is waited for twice as long."""


class NotSent(Exception):
    """A function or its arguments cannot go to another process, or there can be none; the message says why."""


class Pool:
    """The two processes; after :meth:`close` others are started when next asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What a function of a module, called with the process group and arguments, gives on each process; it raises nothing.

        Raises:
            NotSent: the arguments cannot be pickled, or not be restored in another process.
            RuntimeError: a process does not start, ends or gives no answer.
        """
        try:
            job = pickle.dumps((function, args))
        except Exception as error:  # whatever the objects of other authors raise
            raise NotSent(f"what two processes need cannot be pickled ({type(error).__name__}: {error})") from error
        with self._lock:
            try:
                return self._answers(job)
            except (EOFError, OSError, TimeoutError) as error:
                self.close()
                raise RuntimeError(
                    f"one of the two processes ended or gave no answer ({type(error).__name__}). A script that starts them has "
                    'its calls under if __name__ == "__main__", since they import it'
                ) from error
            except KeyboardInterrupt:
                self.close()
                raise

    def _answers(self, job: bytes) -> list[Any]:
        if not self._pipes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(job)
        unreadable = [answer for answer in self._received() if answer is not None]
        for pipe in self._pipes:  # neither begins what the other cannot
            pipe.send(not unreadable)
        if unreadable:
            raise NotSent(f"another process cannot restore what it needs ({unreadable[0]})")
        return self._received()

    def _received(self) -> list[Any]:
        found = []
        for pipe in self._pipes:
            if not pipe.poll(2 * PATIENCE):
                raise TimeoutError
            found.append(pipe.recv())
        return found

    def _start(self) -> None:
        import torch.distributed as dist
        import torch.multiprocessing as mp

        if not dist.is_available() or not dist.is_gloo_available():
            raise NotSent("this build of torch has no torch.distributed with gloo")
        atexit.register(self.close)
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        for rank in range(SIZE):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store, there), daemon=True)
            self._pipes.append(here)
            process.start()
            self._processes.append(process)
            there.close()  # so that the end of the process is the end of the pipe

    def close(self) -> None:
        """End the processes, which they do by themselves where the pipe ends, unless they wait for each other."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()
        if self._folder is not None:
            self._folder.cleanup()
        self._pipes, self._processes, self._folder = [], [], None
        atexit.unregister(self.close)


@functools.cache
def pool() -> Pool:
    """The pool of this process."""
    return Pool()


def _serve(rank: int, store: str, pipe: Connection) -> None:
    """What each of the processes does: restore a job, say whether that went well, and run it if it did for both."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, SIZE),  # type: ignore[attr-defined]  # public, by its documentation
        rank=rank,
        world_size=SIZE,
        timeout=datetime.timedelta(seconds=PATIENCE),
    )
    while True:
        try:
            job = pipe.recv_bytes()
        except EOFError:
            dist.destroy_process_group()
            return
        function, args, unreadable = None, (), None
        try:
            function, args = pickle.loads(job)
        except Exception as error:  # whatever the modules and objects of other authors raise
            unreadable = f"{type(error).__name__}: {error}"
        pipe.send(unreadable)
        if pipe.recv() and function is not None:
            pipe.send(function(dist.group.WORLD, *args))

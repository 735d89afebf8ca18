"""All processes that torchrun started together, for programs that make no process group themselves."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from curvalg.distributed.group import Group
from curvalg.distributed.making import make_group
from curvalg.distributed.start import start


@dataclass(frozen=True)
class Launched:
    """The processes of a program.

    Args:
        group: their process group, for ``Problem(..., group=)``.
        exchange: what is exchanged between them beside what is of one problem.
    """

    group: Any
    exchange: Group


@contextmanager
def launched() -> Iterator[Launched]:
    """The processes that torchrun started, whose process group is made here and ends here, unless there is one.

    Raises:
        ProblemError: torchrun did not start this process.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        yield _all(dist.group.WORLD)
        return
    start()
    try:
        yield _all(dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def _all(world: Any) -> Launched:
    return Launched(world, make_group(world, torch.device("cpu"), threading.RLock()))

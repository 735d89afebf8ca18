"""The exchanges that belong to a process group of torch.distributed."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from curvalg.distributed.group import Group
from curvalg.distributed.processes import Processes
from curvalg.distributed.sharding.grid import ProcessGrid
from curvalg.distributed.sharding.sharded_processes import ShardedProcesses
from curvalg.errors import ProblemTypeError


def make_group(
    group: Any, device: torch.device, lock: AbstractContextManager[Any], *, grid: ProcessGrid | None = None
) -> Group:
    """The exchanges of a problem.

    Args:
        group: a ProcessGroup or a one-dimensional DeviceMesh of torch.distributed; None: of one process.
        device: where the parameters are.
        lock: the problem's.
        grid: the processes, where each has a part of the parameters.

    Raises:
        ProblemTypeError: something else.
    """
    if group is None:
        return Group()
    if grid is not None:
        return ShardedProcesses(grid, device, lock)
    found = _resolved(group)
    return Group() if _sizes(found)[1] == 1 else Processes(found, device, lock)


def process_group(group: Any = None) -> tuple[int, int]:
    """The rank of this process and the number of processes of a group; None: of all, (0, 1) where there is one."""
    import torch.distributed as dist

    if group is None and not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return _sizes(None if group is None else _resolved(group))


def _sizes(group: Any) -> tuple[int, int]:
    import torch.distributed as dist

    return dist.get_rank(group), dist.get_world_size(group)


def _resolved(group: Any) -> Any:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise ProblemTypeError(
            "group= is a process group, but torch.distributed is not initialised; call torch.distributed.init_process_group() "
            "first, and start the script with torchrun"
        )
    if hasattr(group, "get_group") and hasattr(group, "mesh"):
        if group.ndim != 1:
            raise ProblemTypeError(
                f"group= is a process group or a mesh of one dimension, got a mesh of {group.ndim}; pass one of its "
                "dimensions, mesh['name']"
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise ProblemTypeError(
            f"group= is a ProcessGroup (torch.distributed.group.WORLD) or a one-dimensional DeviceMesh, "
            f"got {type(group).__name__}"
        )
    return group

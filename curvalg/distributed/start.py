"""The processes that torchrun has started, brought together."""

from __future__ import annotations

import datetime
import os
from typing import Any

from curvalg.errors import ProblemError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun says in the environment."""


def start(backend: str | None = None, *, timeout: float | None = None) -> Any:
    """Bring together the processes that torchrun has started, and give the group of all of them.

    As ``torch.distributed.init_process_group()``, with two differences. A job that torchrun has started again
    (``--max-restarts``) meets under a name of its own: torch keeps the addresses of the processes that ended, and the new ones
    may wait for these. And on a machine with a GPU for each of its processes, that of its ``LOCAL_RANK`` becomes the current
    device.

    Args:
        backend: of torch.distributed; None: nccl for tensors on GPUs, where each process of the machine has one; gloo else.
        timeout: seconds after which an exchange is given up; None: torch's default, ten minutes for nccl and thirty else.

    Returns:
        The process group, for ``Problem(..., group=)``; that of before, where it is there already.

    Raises:
        ProblemError: this process was not started by torchrun.
    """
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return dist.group.WORLD
    if missing := [name for name in VARIABLES if not os.environ.get(name)]:
        raise ProblemError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set; start them with torchrun, as in torchrun "
            "--nproc-per-node=2 script.py, or unset WORLD_SIZE for one process"
        )
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_RANK", 0))
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))  # all of a machine have to choose alike
    accelerated = torch.cuda.is_available() and neighbours <= torch.cuda.device_count() and dist.is_nccl_available()
    if accelerated and backend is None:
        torch.cuda.set_device(local)
    backend = backend or ("cpu:gloo,cuda:nccl" if accelerated else "gloo")
    patience = None if timeout is None else datetime.timedelta(seconds=timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0":
        dist.init_process_group(backend, timeout=patience)
        return dist.group.WORLD
    place, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    own = dist.TCPStore(place, port, size, is_master=not hosted and rank == 0)  # type: ignore[attr-defined]
    store = dist.PrefixStore(f"attempt {attempt}", own)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    return dist.group.WORLD

"""Free memory on the device of a problem."""

from __future__ import annotations

from pathlib import Path

import torch

_CONTAINERS = (
    ("memory.max", "memory.current"),  # control groups, version 2
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),  # version 1
)


def free_memory(device: torch.device, groups: Path = Path("/sys/fs/cgroup")) -> int:
    """The bytes that can be allocated on a device now.

    On a host what is available without swapping, and no more than the container's limit leaves; on a GPU what the driver
    has left and what torch holds in reserve.

    Args:
        device: of the problem.
        groups: where the operating system lists the limits of a container.
    """
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserve
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used in _CONTAINERS:
        try:
            left = int((groups / limit).read_text()) - int((groups / used).read_text())
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
        free = min(free, max(left, 0))
    return free

"""What a device has: free memory and floats; and how tensors come from it to the host."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

_CONTAINERS = (
    ("memory.max", "memory.current"),  # control groups, version 2
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),  # version 1
)


def widest(device: torch.device) -> torch.dtype:
    """The widest float of a device: float64, or float32 where there is no other (Apple's GPUs, some of Intel's)."""
    if device.type == "cpu":
        return torch.float64
    if device.type == "mps":
        return torch.float32
    properties = getattr(torch.get_device_module(device), "get_device_properties", None)
    double = properties is None or getattr(properties(device), "has_fp64", True)
    return torch.float64 if double else torch.float32


def wide(t: Tensor) -> Tensor:
    """A tensor in the widest float of its device."""
    return t.to(widest(t.device))


def small(t: Tensor) -> Tensor:
    """A tensor for small dense problems: float64 on the CPU."""
    return t.cpu().to(torch.float64)  # in two steps: some devices have no float64


def smalls(*tensors: Tensor) -> list[Tensor]:
    """Tensors for small dense problems as of :func:`small`, by one wait for the device."""
    away = [t for t in tensors if t.device.type != "cpu"]
    if not away:
        return [small(t) for t in tensors]
    packed = small(torch.cat([wide(t.reshape(-1)) for t in away]))
    parts = iter(packed.split([t.numel() for t in away]))
    return [small(t) if t.device.type == "cpu" else next(parts).reshape(t.shape) for t in tensors]


def workspace(device: torch.device, share: float, least: int) -> int:
    """Bytes that one computation may take: what suits a host's caches or, if more, a share of all memory of a GPU.

    A share of all and not of what is free, so that a run goes on with the same numbers; less only where little is free.

    Args:
        device: of the problem.
        share: of its memory.
        least: as on a host.
    """
    if device.type != "cuda":
        return least
    whole = int(torch.cuda.mem_get_info(device)[1])
    return max(least, min(int(share * whole), free_memory(device) // 4))


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

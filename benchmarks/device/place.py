"""Where a run computes, and how large what it computes is."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import processor

SIMULATOR = "tests.support.simulated_gpu"


@dataclass(frozen=True)
class Place:
    """A device.

    Args:
        device: "cpu" or "cuda".
        simulated: whether it is a CPU that passes for a GPU.
    """

    device: str
    simulated: bool = False

    @property
    def real(self) -> bool:
        """Whether it is a GPU: it has streams that are late, an allocator of its own, and time for large models."""
        return self.device.startswith("cuda") and not self.simulated

    @property
    def name(self) -> str:
        """What the machine calls the device."""
        if self.simulated:
            return "simulated"
        return torch.cuda.get_device_name() if self.real else processor()

    @property
    def slug(self) -> str:
        """The name, as that of a file."""
        return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|@.*", "", self.name.lower())).strip("-")

    def wait(self) -> None:
        """Until everything that was queued is done."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def busy(self) -> Tensor:
        """Queue tenths of a second of matrix products; what is queued behind them is late. Nothing, where nothing is late."""
        if not self.real:
            return torch.zeros((), device=self.device)
        a = torch.full((8192, 8192), 1e-4, device=self.device)
        for _ in range(20):
            a = a @ a * 1e-4
        return a

    @contextmanager
    def stream(self) -> Iterator[Any]:
        """A stream of its own, to compute on; nothing on a CPU."""
        if not self.device.startswith("cuda"):
            with nullcontext():
                yield None
            return
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            yield other
        torch.cuda.current_stream().wait_stream(other)


def find(device: str | None) -> Place:
    """The place that was asked for; a GPU where there is one.

    Raises:
        ValueError: it is not here.
    """
    simulated = SIMULATOR in sys.modules
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"{device} is not here: torch sees no GPU; --simulated simulates one")
    return Place(device, simulated and device.startswith("cuda"))

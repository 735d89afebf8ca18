"""Problems on the CPU and on a device: the same model and data, copied."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.device.place import Place
from benchmarks.effort import Sizes
from benchmarks.workload import Batches, build
from curvalg import Problem


@dataclass(frozen=True)
class Given:
    """What a problem is made of.

    Args:
        model: in the dtype of the problem.
        loss: the mean cross-entropy.
        data: batches.
        device: where all of it is.
    """

    model: torch.nn.Module
    loss: torch.nn.Module
    data: Batches
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def problem(self, **options: Any) -> Problem:
        """A fresh one."""
        return Problem(self.model, self.loss, self.data, **options)

    def to(self, place: Place, dtype: torch.dtype = torch.float64) -> Given:
        """A copy on a device."""
        move = lambda t: t.to(place.device, dtype) if t.is_floating_point() else t.to(place.device)  # noqa: E731
        data = [(move(X), move(y)) for X, y in self.data]
        model = copy.deepcopy(self.model).to(place.device, dtype)
        return Given(model, self.loss, data, torch.device(place.device))


def given(name: str, batches: int = 3) -> Given:
    """A model of the suite with its data, in float64 on the CPU.

    Args:
        name: a key of ``MODELS``.
        batches: that the data are split into.
    """
    workload = build(name, Sizes(), batches=batches)
    found = Given(workload.model, workload.loss, workload.data)
    return found.to(Place("cpu"))


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers in float64 on the CPU, the same for every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scaled_error(value: Any, reference: Any) -> float:
    """‖value − reference‖ / ‖reference‖, of numbers and tensors anywhere; 0 for equal ones."""
    a, b = (torch.as_tensor(x).detach().cpu().double() for x in (value, reference))
    if a.shape != b.shape:
        return float("inf")
    off = float((a - b).norm())
    off = off / float(b.norm()) if off and float(b.norm()) else off
    return off if off == off else float("inf")


def same_bits(place: Place, a: Tensor, b: Tensor) -> bool:
    """Whether two results are the same, bit for bit on a GPU.

    Elsewhere to rounding: what a kernel of a CPU rounds to depends on where in memory its tensors lie.
    """
    a, b = a.cpu(), b.cpu()
    return torch.equal(a, b) if place.real else scaled_error(a, b) <= 1e3 * torch.finfo(a.dtype).eps

"""The same problem on the CPU and on a device, and the comparison of what they give."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from curvalg import Problem
from curvalg.tensors import trees
from tests.support.zoo import make

SIMULATED = "tests.support.simulated_gpu" in sys.modules


def in_turn(first: Sequence[Any], second: Sequence[Any]) -> list[tuple[Any, Any]]:
    """All pairs on a real GPU; on the simulated one, which is slow, the second ones take turns."""
    if not SIMULATED:
        return [(a, b) for a in first for b in second]
    return [(a, second[i % len(second)]) for i, a in enumerate(first)]


def moved(tree: Any, device: str = "cuda") -> Any:
    """A batch, or batches, with every tensor on the device."""
    return trees.tensor_map(lambda t: t.to(device), tree)


def both(name: str, **options: Any) -> tuple[Problem, Problem]:
    """The problem of a case on the CPU, and the same on the device."""
    if SIMULATED and name in ("lstm", "gru"):
        pytest.skip("the simulated GPU has no recurrent kernels")
    case = make(name)
    options = {**case.options, **options}
    cpu = Problem(case.model, case.loss, case.batches, **options)
    loss = copy.deepcopy(case.loss).cuda() if isinstance(case.loss, torch.nn.Module) else case.loss
    return cpu, Problem(copy.deepcopy(case.model).cuda(), loss, moved(case.batches), **options)


def agree(want: Any, got: Any, rtol: float = 1e-9) -> None:
    """Make sure that two results are the same up to rounding, relative to the largest number."""
    want, got = (torch.as_tensor(x, device="cpu") if not isinstance(x, Tensor) else x.cpu() for x in (want, got))
    assert got.shape == want.shape
    assert torch.isfinite(want).all()
    assert float((got - want).abs().max()) <= rtol * float(want.abs().max().clamp_min(1e-30))

"""Parts of tensors as DTensors, differentiable twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvalg.errors import ProblemError
from curvalg.tensors.partial_tensors import is_distributed, is_part


@dataclass(frozen=True)
class Spread:
    """How a DTensor lies over a mesh.

    Args:
        mesh: of tensor parallelism.
        placements: along its dimensions.
        shape, stride: of the whole tensor.
    """

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    @staticmethod
    def like(tensor: Any) -> Spread | None:
        """How a DTensor lies; None for anything else."""
        if not is_part(tensor):
            return None
        return Spread(tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride())

    def of(self, part: Tensor) -> Tensor:
        """A part as the DTensor whose part it is, with its graph."""
        from torch.distributed.tensor import DTensor

        made: Tensor = DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )
        return made


def whole_of(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor, one that is under way once it is there, and any other as it is."""
    if is_part(tensor):
        tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return tensor.clone() if is_distributed(tensor, "AsyncCollectiveTensor") else tensor


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """A context in which tensors become DTensors with a right second derivative.

    Where the gradient of ``DTensor.from_local`` has to be summed over processes, torch (2.13) drops its graph, so that second
    derivatives of all layers before the first parallel one come out wrong, without an error.

    Raises:
        ProblemError: torch's own functions have changed, so that they cannot be mended here.
    """
    from torch.distributed.tensor import _api as api

    torchs: Any = getattr(api, "_FromTorchTensor", None)
    normalised: Any = getattr(api, "_normalize_placements_for_grad", None)
    if torchs is None or normalised is None:
        raise ProblemError(
            "second derivatives of models of parallelize_module are wrong in torch, and cannot be mended in this version of "
            "it; use fully_shard, or torch 2.13"
        )

    class FromTorchTensor(torchs):  # type: ignore[misc]
        """The same, with a gradient that keeps its graph."""

        @staticmethod
        def backward(ctx: Any, cotangent: Any) -> tuple[Any, ...]:
            nothing = (None,) * 6
            if cotangent is None:
                return None, *nothing
            placements = ctx.grad_placements or normalised(ctx.forward_input_placements)
            if cotangent.placements != tuple(placements):
                cotangent = cotangent.redistribute(ctx.forward_input_device_mesh, placements)
            return cotangent.to_local(), *nothing

    setattr(api, "_FromTorchTensor", FromTorchTensor)  # noqa: B010  it is a class, which no type checker lets go
    try:
        yield
    finally:
        setattr(api, "_FromTorchTensor", torchs)  # noqa: B010

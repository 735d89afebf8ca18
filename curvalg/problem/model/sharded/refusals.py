"""Models of which this process has a part only: refused by name, with advice."""

from __future__ import annotations

from typing import Any

from torch import nn

from curvalg.errors import ExpressionError, ProblemError
from curvalg.tensors.partial_tensors import is_distributed, is_part


def require_unsharded(module: nn.Module) -> None:
    """Raise for a model of which this process has a part only, whichever parameters are chosen.

    Raises:
        ProblemError: it is wrapped by FSDP, or has parameters or buffers that are DTensors.
    """
    for name, child in module.named_modules():
        if is_distributed(child, "FullyShardedDataParallel"):
            what = f"the module {name!r}" if name else "the model"
            raise ProblemError(
                f"{what} is wrapped by FullyShardedDataParallel, so that each process has a part of it; gather the parameters "
                "first (a full state dict, FullyShardedDataParallel.state_dict_type), load them into an unsharded copy of "
                "the model, and make the Problem of that"
            )
    for name, p in module.named_parameters():
        require_whole(name, p)
    for name, b in module.named_buffers():
        require_whole(name, b, "buffer")


def require_whole(name: str, tensor: object, kind: str = "parameter") -> None:
    """Raise for a part of a tensor.

    Raises:
        ProblemError: it is a DTensor.
    """
    if is_part(tensor):
        raise ProblemError(
            f"{kind} {name!r} is a DTensor, a part of a tensor that is spread over processes; pass group=, the mesh that "
            "the model was sharded over by fully_shard or parallelize_module, or make the Problem of an unsharded copy of the "
            "model (full_tensor(), or the full state dict)"
        )


def require_whole_vectors(problem: Any, what: str) -> None:
    """Raise where each process holds a part of vectors only, for ``what`` takes whole ones or gradients of single samples."""
    if problem.group.sharded:
        raise ExpressionError(
            f"{what} needs whole vectors over the parameters, or gradients of single samples, which no process has where "
            "parameters are sharded; use products, solves and the estimators that docs/howto/sharded.md lists, or make the "
            "Problem of a whole model on every process (group= without shard=) where it fits"
        )

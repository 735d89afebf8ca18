"""What the user passed as a model, as a function of its chosen parameters."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from curvalg.distributed.making import process_group
from curvalg.distributed.sharding.grid import make_grid
from curvalg.errors import ProblemError, ProblemTypeError
from curvalg.problem.model import parameters as params_
from curvalg.problem.model.model import Adapter, CallableModel, Model, ModuleModel, unwrap
from curvalg.problem.model.sharded.set_aside import fully_sharded
from curvalg.problem.model.sharded.sharded_model import ShardedModel
from curvalg.tensors.partial_tensors import is_part

Shard = Literal["parameters"] | None


def make_model(
    model: Any,
    params: params_.Selection,
    forward: Adapter | None,
    shard: Shard = None,
    group: Any = None,
) -> Model:
    """The model as a function of its chosen parameters.

    Args:
        model: of the user.
        params: which parameters.
        forward: ``forward(model, batch)``.
        shard: whether to cut the parameters of a whole model.
        group: the processes that share the problem; None: there are no others.

    Raises:
        ProblemError: neither a module nor a function, a selection that does not fit, or parts of a model whose other parts
            are nowhere.
    """
    if forward is not None and not callable(forward):
        raise ProblemTypeError(
            f"forward is a function of the model and a batch, got {forward!r}; write forward=lambda model, batch: ..."
        )
    if shard not in (None, "parameters"):
        raise ProblemError(f"shard is None or 'parameters', got {shard!r}")
    if isinstance(model, nn.Module):
        module = unwrap(model)
        cut = bool(fully_sharded(module))
        parallel = not cut and any(is_part(p) for p in module.parameters())
        if group is not None and (cut or parallel or (shard is not None and process_group(group)[1] > 1)):
            return ShardedModel(module, params, forward, make_grid(group, parallel=parallel))
        if shard is not None and group is None:
            raise ProblemError(
                "shard='parameters' cuts the parameters over the processes of group=; pass group=torch.distributed.group.WORLD "
                "in a script that torchrun starts, or leave shard= out"
            )
        return ModuleModel(module, params, forward)
    if callable(model):
        if shard is not None:
            raise ProblemError(
                "shard='parameters' needs an nn.Module, whose parameters are whole one module at a time; pass the module "
                "itself with forward=lambda module, batch: ..., or leave shard= out"
            )
        return CallableModel(model, params, forward)
    raise ProblemTypeError(
        f"model must be an nn.Module or a function (params, inputs) -> output, got {type(model).__name__}; the order is "
        "Problem(model, loss, data), and parameters are chosen by params="
    )

"""What users get wrong with models that lie in parts, and faults in the middle of a model call."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from curvalg import Problem, inverse, parse
from tests.support.rank_faults import Planted, after, at_exchange
from tests.support.ranks import Failed, failed
from tests.support.sharded_models import cut, made, vector


def _mesh(group: Any) -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(group, "cpu", mesh_dim_names=("data",))


def _data() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 6), torch.randint(0, 3, (4,))


def _problem(module: nn.Module, **options: Any) -> Problem:
    return Problem(module, nn.CrossEntropyLoss(), _data(), **options)


def _of_other_processes(group: Any) -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = fully_shard(made("mlp"), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return _problem(net, group=group)


def _without_group(group: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    return _problem(fully_shard(made("mlp"), mesh=_mesh(group)))


def _in_part(group: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    net = made("mlp")
    fully_shard(net[0], mesh=_mesh(group))  # type: ignore[index]
    return _problem(net, group=group)


def _not_contiguous(group: Any) -> Any:
    net: Any = made("mlp")
    net[0].weight.data = net[0].weight.data.T.contiguous().T
    return _problem(net, group=group, shard="parameters")


def _wrong_forward(group: Any) -> Any:
    import torch.distributed as dist

    problem, _, _ = cut(group, "data", "mlp")
    module: Any = problem.model.module  # type: ignore[union-attr]
    if dist.get_rank(group):
        module[1].forward = lambda x: x[:, :3]
    return parse("hessian").lower(problem) @ vector(problem.size)


def _not_finite(group: Any) -> Any:
    import torch.distributed as dist

    X, y = torch.randn(4, 6), torch.randint(0, 3, (4,))
    if dist.get_rank(group):
        X[0, 0] = float("nan")
    problem = Problem(made("mlp"), nn.CrossEntropyLoss(), (X, y), group=group, shard="parameters")
    return parse("hessian").lower(problem) @ torch.randn(problem.size)


def _torchs_derivative(group: Any) -> Any:
    """Tensor parallelism as torch differentiates it."""
    from contextlib import nullcontext
    from unittest import mock

    problem, whole, index = cut(group, "tensor", "mlp")
    with mock.patch("curvalg.problem.model.sharded.sharded_model.twice_differentiable", nullcontext):
        return parse("hessian").lower(problem) @ vector(whole.size)[index]


def _expression(text: str) -> Callable[[Any], Any]:
    return lambda group: parse(text).lower(cut(group, "data", "mlp")[0])


def _option(**options: Any) -> Callable[[Any], Any]:
    return lambda group: cut(group, "data", "mlp", **options)


def _long_vector(group: Any) -> Any:
    problem, whole, _ = cut(group, "data", "mlp")
    return parse("ggn").lower(problem) @ vector(whole.size)


TRAPS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "sharded over other processes": (_of_other_processes, "pass the mesh that the model was sharded over"),
    "no group": (_without_group, "pass group="),
    "sharded in part": (_in_part, "fully_shard(model)"),
    "not contiguous": (_not_contiguous, "contiguous()"),
    "shard= without a group": (lambda g: _problem(made("mlp"), shard="parameters"), "pass group="),
    "shard= of a function": (
        lambda g: Problem(
            lambda p, x: x @ p["w"],
            nn.MSELoss(),
            (torch.ones(2, 3), torch.ones(2)),
            params={"w": torch.ones(3)},
            group=g,
            shard="parameters",
        ),
        "nn.Module",
    ),
    "another word": (lambda g: _problem(made("mlp"), group=g, shard="weights"), "'parameters'"),
    "cache": (_option(cache=2**20), "cache=1048576 is not offered"),
    "columns": (_option(columns=4), "columns=4 is not offered"),
    "frozen draws": (_option(randomness="frozen"), "model.eval()"),
    "jacobian": (_expression("jacobian"), "rows of outputs"),
    "blocks": (_expression("block_diagonal(ggn)"), "not offered where parameters are sharded"),
    "a structured solver": (
        lambda g: inverse(parse("ggn + 0.1*identity"), solver="dense").lower(cut(g, "data", "mlp")[0]),
        "leave out solver=",
    ),
    "a whole vector": (_long_vector, "expected"),
    "derivatives that torch drops": (_torchs_derivative, "derivatives of the model are wrong"),
    "NaN on one rank": (_not_finite, "finite"),
    "a forward that fails on one rank": (_wrong_forward, "failed"),
}


def trapped(group: Any, name: str) -> tuple[Any, float]:
    """What comes of a mistake, and the error of a product by the same processes after it."""
    try:
        TRAPS[name][0](group)
        found: Any = "no error"
    except Exception as error:
        found = failed(error)
    torch.set_default_dtype(torch.float32)
    return found, after(group)


def _raise() -> None:
    raise Planted("planted")


def faults(group: Any, kind: str, count: int) -> list[tuple[Any, float]]:
    """What comes where one rank fails before exchanges at random, and the error of the next product."""
    import torch.distributed as dist

    rank, chance = dist.get_rank(group), random.Random(3)
    problem, whole, index = cut(group, kind, "mlp")
    v, op = vector(whole.size), parse("hessian + ggn_class").lower(problem)
    expected, found = parse("hessian + ggn_class").lower(whole) @ v, []
    for _ in range(count):
        number, victim = chance.randrange(1, 60), chance.randrange(dist.get_world_size(group))
        try:
            with at_exchange(problem.group, number if rank == victim else -1, _raise):
                op @ v[index]
            caught: Any = "no error"
        except Exception as error:
            caught = failed(error)
        got = op @ v[index]
        found.append((caught, float((got - expected[index]).norm() / expected.norm())))
    return found


def is_known(found: Any) -> bool:
    """Whether a fault came as the error itself, or told by another rank."""
    return isinstance(found, Failed) and bool({"Planted", "GroupError"} & set(found.kind))

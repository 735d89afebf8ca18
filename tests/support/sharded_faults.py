"""What users get wrong with models that lie in parts, and faults in the middle of a model call."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import curvalg.estimate as est
from curvalg import Problem, differentiable, inverse, parse, save
from curvalg_plugins.laplace import laplace
from curvalg_plugins.ntk import cross_kernel
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


def _twice(group: Any) -> Any:
    torch.manual_seed(0)
    return _problem(made("mlp"), group=group, shard="parameters").value()


def _of_tensor_parallelism(
    data: Callable[[int], Any], verify: Callable[[int], bool] = lambda rank: True
) -> Callable[[Any], Any]:
    """A model cut by ``parallelize_module`` alone, with data and an option that are functions of the rank."""

    def trap(group: Any) -> Any:
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        torch.manual_seed(0)
        mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tensor",))
        net = parallelize_module(made("mlp"), mesh, {"3": ColwiseParallel(), "5": RowwiseParallel()})
        rank = dist.get_rank(group)
        return Problem(net, nn.CrossEntropyLoss(), data(rank), group=mesh, verify=verify(rank)).gradient()

    return trap


def _other_order(rank: int) -> Any:
    X, y = torch.randn(4, 6), torch.randint(0, 3, (4,))
    return (X.flip(0), y.flip(0)) if rank else (X, y)


def _shuffled(rank: int) -> Any:
    from torch.utils.data import DataLoader, TensorDataset

    return DataLoader(TensorDataset(torch.randn(4, 6), torch.randint(0, 3, (4,))), 2, shuffle=True)


class _Listed(nn.Module):
    """Its first weight is read from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 4), nn.Linear(4, 3)
        self.kept = [[self.first.weight]]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.linear(x, self.kept[0][0], self.first.bias).tanh())


class _Counting(nn.Module):
    """Its output depends on how often models of its class were called."""

    calls = [0]

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        counted = _Counting.calls.copy()
        _Counting.calls = [counted[0] + 1]
        return self.head(x) * (1 + counted[0])


def _module(make: Callable[[], nn.Module]) -> Callable[[Any], Any]:
    def trap(group: Any) -> Any:
        import torch.distributed as dist

        torch.manual_seed(dist.get_rank(group))
        data = _data()
        torch.manual_seed(0)
        return Problem(make(), nn.CrossEntropyLoss(), data, group=group, shard="parameters").gradient()

    return trap


def _penalised(group: Any) -> Any:
    import torch.distributed as dist

    net = made("mlp")
    weights, data = list(net.parameters()), (torch.randn(4, 6) + dist.get_rank(group), torch.randint(0, 3, (4,)))

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(z, y) + 0.1 * sum(w.square().sum() for w in weights)

    return Problem(net, loss, data, reduction="mean", group=group, shard="parameters").gradient()


def _columns(kind: str) -> Callable[[Any], Any]:
    def trap(group: Any) -> Any:
        import torch.distributed as dist

        problem, _, _ = cut(group, kind, "mlp")
        return parse("ggn").lower(problem) @ torch.ones(problem.size, 1 + dist.get_rank(group))

    return trap


def _asked(ask: Callable[[Problem], Any]) -> Callable[[Any], Any]:
    return lambda group: ask(cut(group, "data", "mlp")[0])


def _written(problem: Problem) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return save(est.eigsh(parse("hessian").lower(problem), 2), f"{folder}/eigenpairs.safetensors")


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
    "the same data on all": (_twice, "distributed.shard"),
    "other data of the same layers": (
        _of_tensor_parallelism(lambda rank: (torch.randn(4, 6) + rank, torch.randint(0, 3, (4,)))),
        "give them the same data",
    ),
    "other batches of the same layers": (
        _of_tensor_parallelism(
            lambda rank: [(torch.ones(n, 6), torch.zeros(n).long()) for n in ((2, 1), (1, 2))[rank]]
        ),
        "give them the same data",
    ),
    "another order of the same layers": (_of_tensor_parallelism(_other_order), "give them the same data"),
    "a loader that shuffles for the same layers": (_of_tensor_parallelism(_shuffled), "shuffle=False"),
    "a weight in a list": (_module(_Listed), "Read it as an attribute"),
    "a state that calls change": (_module(_Counting), "not the same in every call"),
    "a penalty in the loss": (_penalised, "Take the penalty out of the loss"),
    "other numbers of columns": (_columns("data"), "the same vectors on all of them"),
    "other numbers of columns of the same layers": (_columns("tensor"), "the same vectors on all of them"),
    "another option on a process that has the same data": (
        _of_tensor_parallelism(lambda rank: (torch.ones(4, 6), torch.zeros(4).long()), verify=lambda rank: not rank),
        "differ in verify=",
    ),
    "influence": (_asked(lambda p: est.influence(inverse(parse("kfac + identity")).lower(p))), "influence needs whole"),
    "self-influence": (
        _asked(lambda p: est.self_influence(inverse(parse("kfac + identity")).lower(p))),
        "self_influence needs whole",
    ),
    "saliency": (_asked(lambda p: est.saliency(parse("ggn").lower(p))), "saliency needs whole"),
    "functional variance": (
        _asked(lambda p: est.functional_variance(inverse(parse("ggn + identity")).lower(p), p)),
        "functional_variance needs whole",
    ),
    "a differentiable number": (
        _asked(lambda p: differentiable.trace(parse("hessian"), p, probes=2)),
        "differentiable needs whole",
    ),
    "a posterior": (_asked(lambda p: laplace(p)), "make the Problem of a whole model"),
    "a kernel of two data sets": (_asked(lambda p: cross_kernel(p, p)), "whole model on every process"),
    "eigenvectors in one file": (_asked(_written), "problem.layout.full"),
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
    _Counting.calls = [0]
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

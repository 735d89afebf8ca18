"""Models, losses and calls of users' own, in parts on several processes, beside plain torch on one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import curvalg.estimate as est
from curvalg import Batch, DatasetTerm, Diagonal, Layout, MatrixTerm, Problem, Term, parse
from tests.support.sharded_models import cut, vector
from tests.support.third_party import CenteredTangent, MeanTangent, Skewed

Batches = Sequence[tuple[Tensor, Tensor]]


class Recurrent(nn.Module):
    """A recurrent layer, which keeps its weights in a list as well, between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rnn, self.head = nn.Linear(4, 5), nn.GRU(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.first(x))[0][:, -1])


class Encoding(nn.Module):
    """A model that is called by another method than forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.scale = nn.Linear(6, 5), nn.Linear(5, 3), nn.Parameter(torch.rand(3))

    def encode(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).tanh()) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(x)


def _net(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def _batches(*shape: int) -> Batches:
    generator = torch.Generator().manual_seed(1)
    X, y = torch.randn(9, *shape, generator=generator), torch.randint(0, 3, (9,), generator=generator)
    return list(zip(X.split(4), y.split(4), strict=True))


def _sharded(net: nn.Module, group: Any, **options: Any) -> tuple[nn.Module, Any]:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("data",))
    for child in net.children():
        fully_shard(child, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options), mesh


def _own(group: Any, batches: Batches) -> Batches:
    import torch.distributed as dist

    rank, size = dist.get_rank(group), dist.get_world_size(group)
    return batches[rank * len(batches) // size : (rank + 1) * len(batches) // size]


def _expected(net: nn.Module, batches: Batches) -> tuple[float, Tensor, Tensor]:
    """The mean loss of all data, its gradient, and the product of its Hessian with a vector, by plain torch."""
    X, y = (torch.cat(part) for part in zip(*batches, strict=True))
    parameters, loss = list(net.parameters()), F.cross_entropy(net(X), y)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    gradient = torch.cat([g.reshape(-1) for g in gradients])
    product = torch.autograd.grad(gradient @ vector(len(gradient)), parameters)
    return float(loss), gradient.detach(), torch.cat([t.reshape(-1) for t in product])


def _errors(problem: Problem, expected: tuple[float, Tensor, Tensor]) -> dict[str, float]:
    index, (value, gradient, product) = problem.layout.places(), expected
    got = parse("hessian").lower(problem) @ vector(len(product))[index]
    return {
        "value": abs(problem.value() - value),
        "gradient": float((problem.gradient() - gradient[index]).norm() / gradient.norm()),
        "product": float((got - product[index]).norm() / product.norm()),
    }


def recurrent(group: Any) -> dict[str, float]:
    torch.set_default_dtype(torch.float64)
    batches = _batches(7, 4)
    net, mesh = _sharded(_net(Recurrent), group)
    problem = Problem(net, nn.CrossEntropyLoss(), _own(group, batches), group=mesh)
    return _errors(problem, _expected(_net(Recurrent), batches))


def by_another_method(group: Any) -> dict[str, float]:
    """Also that the method trains afterwards."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    torch.set_default_dtype(torch.float64)
    batches = _batches(6)
    net, mesh = _sharded(_net(Encoding), group)
    register_fsdp_forward_method(net, "encode")
    given: Any = net
    before = given.encode
    problem = Problem(
        net,
        nn.CrossEntropyLoss(),
        _own(group, batches),
        group=mesh,
        forward=lambda model, batch: model.encode(batch[0]),
    )
    expected = _expected(_net(Encoding), batches)
    found = _errors(problem, expected)
    assert given.encode is before
    loss = F.cross_entropy(given.encode(torch.cat([x for x, _ in batches])), torch.cat([y for _, y in batches]))
    return {**found, "trained": abs(float(loss) - expected[0])}


def after_forwards(group: Any) -> dict[str, float]:
    """Products after forwards of the user's that leave all weights whole, and a backward after the products."""
    torch.set_default_dtype(torch.float64)
    batches = _batches(6)
    net, mesh = _sharded(_net(Encoding), group, reshard_after_forward=False)
    problem = Problem(net, nn.CrossEntropyLoss(), _own(group, batches), group=mesh)
    op, expected = parse("hessian").lower(problem), _expected(_net(Encoding), batches)
    X, y = (torch.cat(part) for part in zip(*batches, strict=True))
    loss = F.cross_entropy(net(X), y)
    got = op @ vector(len(expected[1]))[problem.layout.places()]
    F.cross_entropy(net(X), y)
    found = _errors(problem, expected)
    loss.backward()
    held = torch.cat([p.grad.to_local().reshape(-1) for p in net.parameters()])  # type: ignore[union-attr]
    index = problem.layout.places()
    return {
        **found,
        "first": float((got - expected[2][index]).norm()),
        "backward": float((held - expected[1][index]).norm()),
    }


def a_function_as_loss(group: Any, empty: bool) -> dict[str, float]:
    """A loss that is tried on each batch, where processes have other numbers of batches, or one has none."""
    torch.set_default_dtype(torch.float64)
    batches = _batches(6)[:1] if empty else _batches(6)
    problem = Problem(
        _net(Encoding), lambda z, y: F.cross_entropy(z, y), _own(group, batches), group=group, shard="parameters"
    )
    return _errors(problem, _expected(_net(Encoding), batches))


def bilinear(group: Any, kind: str) -> float:
    """The error of forms gᵀAh, whose numbers are on all processes."""
    problem, whole, index = cut(group, kind, "mlp")
    g, h = torch.stack([vector(whole.size), vector(whole.size, 6)], 1), vector(whole.size, 7)
    expected = g.T @ (parse("hessian").lower(whole) @ h)[:, None]
    return float((est.bilinear(parse("hessian").lower(problem), g[index], h[index]) - expected).abs().max())


def after_a_mistake(group: Any, mistake: str) -> tuple[str, float]:
    """What the first product gives where one process has NaN in its vector, or another model, and the error of the next one."""
    import torch.distributed as dist

    problem, whole, index = cut(group, "data", "mlp")
    op, v = parse("hessian").lower(problem), vector(whole.size)
    wrong, module = v[index].clone(), problem.model.module  # type: ignore[union-attr]
    if dist.get_rank(group):
        if mistake == "vector":
            wrong[0] = torch.nan
        else:
            module.changed = True
    try:
        op @ wrong
        raised = "nothing"
    except Exception as error:
        raised = type(error).__name__
    module.__dict__.pop("changed", None)
    expected = parse("hessian").lower(whole) @ v
    return raised, float((op @ v[index] - expected[index]).norm() / expected.norm())


def written(group: Any, path: str) -> float:
    """What every process reads right after all wrote a result together, along both sides of a mesh."""
    from curvalg import load, save

    problem, _, _ = cut(group, "both", "mlp")
    found = est.trace(parse("ggn").lower(problem), products=12)
    save(found, path, problem=problem)
    return float(abs(load(path).value - found.value))


def terms_of_others(group: Any, kind: str) -> dict[str, float]:
    """Errors of terms that do not know of batches that count for nothing, where processes have other numbers of batches."""
    problem, whole, index = cut(group, kind, "mlp")
    v, found = vector(whole.size), {}
    for term in (Skewed(), MeanTangent(), CenteredTangent(), Pulled(), HalfSquares(), Inputs()):
        expected = term.lower(whole) @ v
        found[str(term)] = float((term.lower(problem) @ v[index] - expected[index]).norm() / expected.norm())
    return found


@dataclass(frozen=True)
class Pulled(DatasetTerm):
    """g gᵀ with the gradient g of the sum of all outputs, which it pulls back itself."""

    def prepare(self, batch: Batch) -> Tensor:
        return batch.vjp(torch.ones_like(batch.output))

    def project(self, vector: Tensor, prepared: Any) -> Tensor:
        return prepared @ vector

    def cotangent_dot(self, batch: Batch, tangent: Tensor, prepared: Any, totals: Any) -> Tensor:  # type: ignore[override]
        return torch.ones_like(batch.output) * totals


@dataclass(frozen=True)
class HalfSquares(Term):
    """The Hessian of half of the squares of all outputs."""

    def cotangent(self, batch: Batch) -> Tensor:
        return batch.output

    def cotangent_dot(self, batch: Batch, tangent: Tensor) -> Tensor:
        return tangent


@dataclass(frozen=True)
class Inputs(MatrixTerm):
    """The number of rows on the diagonals of the layers that have weights: no loss is in it."""

    uses_layers = True

    def accumulate(self, batch: Batch, prepared: Any = None) -> dict[str, Tensor]:
        ones = torch.ones_like(batch.output)[None]
        return {name: torch.tensor(float(r.rows)) for r in batch.layers(ones) for name in r.params}

    def of_layers(self, stats: Any, names: Any) -> Any:
        return {name: value for name, value in stats.items() if name in names}

    def finish(self, stats: Any, layout: Layout, prepared: Any = None) -> Diagonal:
        return Diagonal(torch.cat([stats[name].expand(shape.numel()) for name, shape in layout.shapes.items()]))

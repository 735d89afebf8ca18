"""Matrices made of layers of models that lie in parts on several processes, beside those of one process that has all."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from curvalg import Identity, Kronecker, Problem, inverse, parse
from tests.support.rank_faults import Planted, at_exchange
from tests.support.ranks import failed
from tests.support.sharded_models import cut, made, vector

TERMS = (
    "kfac",
    "kfac(fisher='mc', samples=2, seed=3)",
    "kfac(fisher='empirical', joint=False)",
    "ekfac",
    "foof",
    "ggn_diagonal",
    "covariance_diagonal",
    "centered_covariance_diagonal",
)


def error(got: Tensor, whole: Tensor, index: Tensor) -> float:
    """The error of this process's numbers, relative to the whole vector."""
    assert got.shape == whole[index].shape
    return float((got - whole[index]).norm() / whole.norm())


def products(group: Any, kind: str, model: str, terms: tuple[str, ...] = TERMS) -> dict[str, float]:
    """Errors of products with matrices, and with their damped inverses."""
    problem, whole, index = cut(group, kind, model)
    v, found = vector(whole.size), {}
    for text in terms:
        matrix = parse(text)
        found[text] = error(matrix.lower(problem) @ v[index], matrix.lower(whole) @ v, index)
        damped = inverse(matrix + 1e-2 * Identity)
        found[f"inverse of {text}"] = error(damped.lower(problem) @ v[index], damped.lower(whole) @ v, index)
    return found


class Lengths(nn.Module):
    """Predicts a token at each position of sequences of any length; batches of one row take another way."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(7, 6), nn.Linear(6, 7)
        self.layers = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(6, 6), nn.Tanh())))

    def forward(self, t: Tensor) -> Tensor:
        h = self.layers(self.tokens(t))
        return self.head(h.sin() if len(t) == 1 else h).transpose(1, 2)


class InTurn(torch.autograd.Function):
    """The identity, by a function whose derivative cannot be taken of several columns at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Tensor:
        return u + 0 * float(u.sum())


class OneByOne(Lengths):
    """Its columns go back one after the other."""

    def forward(self, t: Tensor) -> Tensor:
        return self.head(InTurn.apply(self.layers(self.tokens(t)))).transpose(1, 2)


def uneven(group: Any, one_by_one: bool) -> dict[str, float]:
    """Errors where each process has other numbers of batches, of rows, and of columns of a row."""
    import torch.distributed as dist

    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2), (2, 12), (1, 5), (4, 7), (1, 3)]
    batches = [tuple(torch.randint(0, 7, shape, generator=generator) for _ in range(2)) for shape in shapes]
    own = [batches[:1], batches[1:4], batches[4:]][dist.get_rank(group)]

    def net() -> nn.Module:
        torch.manual_seed(0)
        return OneByOne() if one_by_one else Lengths()

    whole = Problem(net(), nn.CrossEntropyLoss(), batches)
    problem = Problem(net(), nn.CrossEntropyLoss(), own, group=group, shard="parameters")
    v, index, found = vector(whole.size), problem.layout.places(), {}
    for text in ("kfac + ggn_diagonal", "ekfac", "kfac(fisher='empirical', approximation='reduce')"):
        found[text] = error(parse(text).lower(problem) @ v[index], parse(text).lower(whole) @ v, index)
    return found


def along_the_last_axis(group: Any) -> dict[str, float]:
    """Errors of products where weights are cut along their columns, so that what a process holds of one is no run of numbers."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    torch.set_default_dtype(torch.float64)
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("data",))
    X, y, rank = torch.randn(6, 6), torch.randint(0, 3, (6,)), dist.get_rank(group)
    whole = Problem(made("mlp"), nn.CrossEntropyLoss(), (X, y))
    net = fully_shard(made("mlp"), mesh=mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1))
    own = slice(3 * rank, 3 * rank + 3)
    problem = Problem(net, nn.CrossEntropyLoss(), (X[own], y[own]), group=mesh)
    columns, index = torch.stack([vector(whole.size), vector(whole.size, 6)], 1), problem.layout.places()
    return {
        text: error(parse(text).lower(problem) @ columns[index], parse(text).lower(whole) @ columns, index)
        for text in ("ekfac", "inverse(kfac + 0.1*identity)")
    }


def solved(group: Any, kind: str) -> dict[str, Any]:
    """A preconditioned solve beside that of one process, and iterations with and without the preconditioner.

    Inputs are of very different sizes, which the factors know; the first process has one batch, the last of three has none.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    X, y = torch.randn(90, 6) * torch.logspace(-1, 1, 6), torch.randn(90, 4)
    batches = list(zip(X.split([20, 33, 37]), y.split([20, 33, 37]), strict=True))
    own = [batches[:1], batches[1:], []][dist.get_rank(group)]

    def net() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 4))

    whole, mesh, module = Problem(net(), nn.MSELoss(), batches), group, net()
    if kind == "data":
        mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=(kind,))
        module = fully_shard(module, mesh=mesh)
    problem = Problem(module, nn.MSELoss(), own, group=mesh, shard="parameters" if kind == "parameters" else None)
    b, matrix, index = vector(whole.size), parse("ggn") + 1e-2 * Identity, problem.layout.places()
    plain = inverse(matrix, solver="cg", rtol=1e-12)
    helped = inverse(matrix, solver="cg", rtol=1e-12, preconditioner=parse("kfac") + 1e-2 * Identity)
    expected, alone, together = inverse(matrix).lower(whole) @ b, plain.lower(problem), helped.lower(problem)
    found = {name: error(op @ b[index], expected, index) for name, op in {"cg": alone, "with kfac": together}.items()}
    counts = [int(op.last_solve.iterations.max()) for op in (alone, together)]
    return {"errors": found, "iterations": counts}


def algebra(group: Any) -> dict[str, float]:
    """Errors of sums, products, roots and inverses in which matrices made of layers take part."""
    problem, whole, index = cut(group, "data", "mlp")
    columns = torch.stack([vector(whole.size), vector(whole.size, 6)], 1)
    texts = (
        "2*kfac - 0.5*ggn_diagonal + 0.1*identity",
        "ggn + 3*kfac + hessian",
        "kfac @ hessian @ ekfac",
        "sqrt(kfac + 0.1*identity)",
        "inverse(2*ekfac + 0.01*identity) @ kfac",
        "inverse(kfac + ggn_diagonal + 0.1*identity)",
        "inverse(ggn + kfac + 0.1*identity, rtol=1e-12)",
    )
    return {t: error(parse(t).lower(problem) @ columns[index], parse(t).lower(whole) @ columns, index) for t in texts}


def counted(group: Any, kind: str) -> dict[str, Any]:
    """Exchanges of a product once the matrix is made, numbers of the factors here, and of the layers that are owned here."""
    problem, whole, index = cut(group, kind, "mlp")
    op, v = inverse(parse("kfac") + 0.1 * Identity).lower(problem), vector(whole.size)
    op @ v[index]
    traffic: Any = problem.group.traffic  # type: ignore[attr-defined]
    before = traffic.swaps.calls, traffic.gathers.calls, traffic.reduce_scatters.calls
    op @ v[index]
    after = traffic.swaps.calls, traffic.gathers.calls, traffic.reduce_scatters.calls
    kept = problem.cached(op.snapshot)
    matrix, place = kept.found("matrix", parse("kfac")), kept.found("ownership", None)
    leaves = [] if matrix.own is None else [node for node in matrix.own.walk() if isinstance(node, Kronecker)]
    return {
        "exchanges": tuple(b - a for a, b in zip(before, after, strict=True)),
        "rows": sum(leaf.size for leaf in leaves),
        "owned": sum(whole.layout.shapes[name].numel() for name in place.layers.own),
        "size": whole.size,
        "explained": op.explain(),
        "planned": str(op.plan(ranks=2)),
        "report": op.last_solve,
    }


def faults(group: Any, count: int) -> list[tuple[Any, float]]:
    """What comes where one rank fails before exchanges at random while a matrix is made, and the error of the next product."""
    import torch.distributed as dist

    rank, chance = dist.get_rank(group), random.Random(5)
    problem, whole, index = cut(group, "parameters", "tied")
    v, expr, found = vector(whole.size), inverse(parse("ekfac") + 0.1 * Identity), []
    expected = expr.lower(whole) @ v
    for _ in range(count):
        number, victim = chance.randrange(1, 300), chance.randrange(dist.get_world_size(group))
        problem.close()
        op = expr.lower(problem)
        try:
            with at_exchange(problem.group, number if rank == victim else -1, _raise):
                op @ v[index]
            caught: Any = "no error"
        except Exception as error_:
            caught = failed(error_)
        found.append((caught, error(op @ v[index], expected, index)))
    return found


def _raise() -> None:
    raise Planted("planted")


class Sorting(nn.Module):
    """Its layer sees the rows of the batch in an order that depends on their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.layer(x[order])[order.argsort()]


class Apart(nn.Module):
    """A layer whose weight and bias belong to different modules."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(
            nn.functional.linear(x, self.one.weight, self.other.bias), self.other.weight, self.one.bias
        )


class ByHand(torch.autograd.Function):
    """A function that no function of torch shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return u @ weight, u.T @ x


class Unseen(nn.Module):
    """A layer in a custom function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(3, 3), nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return ByHand.apply(self.first(x), self.layer.weight)


MODELS = {"rows that move": Sorting, "a layer of two modules": Apart, "an unseen layer": Unseen}


def refused(group: Any, name: str) -> Any:
    """What comes of a matrix that is not offered, of a model or an expression."""
    import torch.distributed as dist

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if name in MODELS:
        net, X = MODELS[name](), torch.randn(4 * size, 3)
        y = torch.randn(len(X), net(X).shape[1])
        own = slice(4 * rank, 4 * rank + 4)
        problem, text = Problem(net, nn.MSELoss(), (X[own], y[own]), group=group, shard="parameters"), "kfac"
    else:
        problem, text = cut(group, "tensor" if name == "parallel" else "data", "mlp")[0], name
        text = "kfac" if name == "parallel" else name
    try:
        parse(text).lower(problem) @ torch.ones(problem.size)
    except Exception as error_:
        return type(error_).__name__, str(error_)
    return "no error", ""

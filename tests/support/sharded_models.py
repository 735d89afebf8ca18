"""Models cut over processes in every way there is, and their products beside those of one process that has all."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import curvalg.estimate as est
from curvalg import Identity, Problem, inverse, parse
from curvalg.errors import VectorError

TERMS = (
    "hessian",
    "ggn",
    "fisher",
    "residual",
    "covariance",
    "centered_covariance",
    "ggn_mc(samples=3, seed=4)",
    "ggn_class",
    "ggn_cross",
    "ggn_within",
    "ggn_same",
    "2*hessian + ggn - 3*centered_covariance + 0.001*identity",
    "ggn @ hessian",
    "hessian.T",
)


SOME = ("hessian", "ggn_class", "2*hessian + ggn - 3*centered_covariance + 0.001*identity")


class Block(nn.Module):
    """Causal attention and two layers, recomputed on the way back."""

    def __init__(self, width: int, *, again: bool) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False) if self.again else self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        q, k, v = self.mixed(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.other(x))))


class Tied(nn.Module):
    """A small language model whose embedding is its head; classes are on the second axis."""

    def __init__(self, *, again: bool = False) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(7, 8), nn.Parameter(0.1 * torch.randn(1, 5, 8))
        self.blocks = nn.ModuleList(Block(8, again=again) for _ in range(2))
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, t: Tensor) -> Tensor:
        x = self.tokens(t) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(x).transpose(1, 2)


class Encoder(nn.Module):
    """A layer whose weights are read by another module than their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def mlp() -> nn.Module:
    """A network with parameters of fewer rows than there are processes."""
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)]
    return nn.Sequential(*layers)


def wide() -> nn.Module:
    """A network with more parameters than estimators take for a small matrix."""
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 20), nn.Tanh(), nn.Linear(20, 3))


def _numbers(model: str) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    if model.startswith("tied"):
        X = torch.randint(0, 7, (9, 5), generator=generator)
        y = torch.randint(0, 7, (9, 5), generator=generator)
        y[2, 1:] = y[5] = -100
    else:
        shape = (13, 4, 8) if model == "encoder" else (13, 6)
        X, y = torch.randn(shape, generator=generator), torch.randint(0, 3, (13,), generator=generator)
        y[4] = -100
    rows = 7 if model == "wide" else 5
    return list(zip(X.split(rows), y.split(rows), strict=True))


def made(model: str) -> nn.Module:
    torch.manual_seed(0)
    makers = {"mlp": mlp, "wide": wide, "tied": Tied, "tied, checkpoints": lambda: Tied(again=True), "encoder": Encoder}
    return makers[model]().eval()


def _sharded(module: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    units = [*module.blocks] if hasattr(module, "blocks") else [m for m in module if list(m.parameters())]  # type: ignore[misc, union-attr]
    for unit in units:
        fully_shard(unit, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def _parallel(module: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    first, second = ("0", "2") if len(list(module.children())) == 5 else ("3", "5")
    plan: dict[str, Any] = {first: ColwiseParallel(), second: RowwiseParallel()}
    if hasattr(module, "blocks"):
        plan = {"blocks.*.wide": ColwiseParallel(), "blocks.*.narrow": RowwiseParallel()}
    return parallelize_module(module, mesh, plan)


def cut(group: Any, kind: str, model: str, **options: Any) -> tuple[Problem, Problem, Tensor]:
    """A problem whose parameters lie in parts, the same one whole, and the places of this process's numbers.

    The first process with other data has one batch, the last of three or more has none.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    torch.set_default_dtype(torch.float64)
    batches = _numbers(model)
    weights = torch.rand(7 if model.startswith("tied") else 3, generator=torch.Generator().manual_seed(3)) + 0.5
    loss = nn.CrossEntropyLoss(weight=weights)
    whole = Problem(made(model), loss, batches)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    module, mesh = made(model), group
    if kind != "parameters":
        shape, names = ((2, size // 2), ("data", "tensor")) if kind == "both" else ((size,), (kind,))
        if len(shape) == 1:
            mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=names)
        else:  # of all processes, which make the groups of its sides together
            mesh = DeviceMesh("cpu", torch.arange(size).reshape(shape), mesh_dim_names=names)
        module = module if kind == "data" else _parallel(module, mesh if kind == "tensor" else mesh["tensor"])
        module = module if kind == "tensor" else _sharded(module, mesh if kind == "data" else mesh["data"])
    place, places = {"tensor": (0, 1), "both": (rank // (size // 2), 2)}.get(kind, (rank, size))
    last = place == min(places, 3) - 1 or places == 1 if places < 3 else place == places - 2
    first = 0 if places == 1 else 1
    own = batches[:first] if place == 0 else batches[first:] if last else []
    if places == 1:
        own = batches
    problem = Problem(module, loss, own, group=mesh, shard="parameters" if kind == "parameters" else None, **options)
    runs = problem.layout.runs
    index = torch.cat([torch.arange(first, first + length) for first, length in runs]) if runs else torch.arange(0)
    return problem, whole, index


def vector(size: int, seed: int = 5) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def products(group: Any, kind: str, model: str, terms: Sequence[str]) -> dict[str, float]:
    """Errors of this process's numbers, relative to the whole vectors."""
    problem, whole, index = cut(group, kind, model)
    found = {"value": abs(problem.value() - whole.value())}
    wanted = whole.gradient()
    found["gradient"] = _error(problem.gradient(), wanted, index)
    v = vector(whole.size)
    for text in terms:
        expr = parse(text)
        found[text] = _error(expr.lower(problem) @ v[index], expr.lower(whole) @ v, index)
    columns = torch.stack([v, vector(whole.size, 6)], 1)
    expr = parse("hessian") + 0.1 * Identity
    found["columns"] = _error(expr.lower(problem) @ columns[index], expr.lower(whole) @ columns, index)
    return found


def _error(got: Tensor, whole: Tensor, index: Tensor) -> float:
    assert got.shape == whole[index].shape
    return float((got - whole[index]).norm() / whole.norm())


def whole_vectors(group: Any, kind: str, model: str) -> dict[str, Any]:
    """Vectors put together on the first process, and products with vectors as users have them: dicts of DTensors."""
    from torch.distributed.tensor import DTensor, Partial

    problem, whole, index = cut(group, kind, model)
    columns = torch.stack([vector(whole.size), vector(whole.size, 6)], 1)
    found: dict[str, Any] = {"refused": []}
    for name, v in {"vector": columns[:, 0], "columns": columns}.items():
        full = problem.layout.full(v[index])
        assert (full is None) == (problem.group.vectors.rank > 0)
        found[name] = full is None or bool(torch.equal(full, v))
    op = parse("hessian").lower(problem)
    parameters: Any = dict(problem.model.module.named_parameters())  # type: ignore[union-attr]
    parts = problem.layout.unflatten(columns[index])
    given: dict[str, Any] = {
        name: DTensor.from_local(
            part.contiguous(),
            p.device_mesh,
            p.placements,
            shape=(*p.shape, 2),
            stride=(*(2 * n for n in p.stride()), 2),
        )
        if isinstance(p := parameters[name], DTensor)
        else part
        for name, part in parts.items()
    }
    products = op @ given
    wanted = whole.layout.unflatten(parse("hessian").lower(whole) @ columns)
    error = torch.tensor(0.0)
    for name, got in products.items():
        assert isinstance(got, DTensor) == isinstance(given[name], DTensor)
        if isinstance(got, DTensor):
            assert got.placements == given[name].placements
            error = error.maximum((got.full_tensor() - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-3))
    found["error"] = float(error)
    unsummed = {
        name: DTensor.from_local(t.to_local(), t.device_mesh, [Partial()] * t.device_mesh.ndim)
        if isinstance(t, DTensor)
        else t
        for name, t in given.items()
    }
    for wrong in (whole.layout.unflatten(columns), unsummed, columns):
        try:
            op @ wrong
        except VectorError as error_:
            found["refused"].append(str(error_))
    return found


def trained(group: Any, kind: str, model: str) -> tuple[list[float], list[float]]:
    """Losses of steps of a model that was multiplied with before, and of one that was not."""

    def losses(*, multiplied: bool) -> list[float]:
        problem, whole, index = cut(group, kind, model)
        module: Any = problem.model.module  # type: ignore[union-attr]
        before = {name: dict(child.__dict__) for name, child in module.named_modules()}
        if multiplied:
            parse("hessian + ggn").lower(problem) @ vector(whole.size)[index]
            problem.value()
            for name, child in module.named_modules():
                assert all(child.__dict__[key] is value for key, value in before[name].items()), name
            assert all(p.grad is None for p in module.parameters())
        X, y = _numbers(model)[0]
        optimizer, found = torch.optim.SGD(module.parameters(), lr=0.1), []
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.cross_entropy(module(X), y)
            loss.backward()
            optimizer.step()
            found.append(float(loss))
        return found

    return losses(multiplied=True), losses(multiplied=False)


def again_after_a_step(group: Any, kind: str, model: str) -> tuple[str, float]:
    """What an operator raises after a step of training, and the error of one made anew."""
    problem, whole, index = cut(group, kind, model)
    op = parse("hessian").lower(problem)
    v = vector(whole.size)
    op @ v[index]
    other: Any = copy.deepcopy(whole)
    problem.step(v[index], 0.01)
    other.step(v, 0.01)
    try:
        op @ v[index]
        raised = "nothing"
    except Exception as error:
        raised = type(error).__name__
    return raised, _error(op.refresh() @ v[index], parse("hessian").lower(other) @ v, index)


def in_half(group: Any, kind: str) -> tuple[float, float, str]:
    """Errors of a product of a bfloat16 model against float32: in parts, and of one process; and the dtype of vectors."""
    import torch.distributed as dist

    def net(dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        return mlp().to(torch.bfloat16).to(dtype)

    torch.set_default_dtype(torch.float32)
    torch.manual_seed(1)
    X, y = torch.randn(32, 6).bfloat16(), torch.randint(0, 3, (32,))
    batches, loss = list(zip(X.split(8), y.split(8), strict=True)), nn.CrossEntropyLoss()
    exact = Problem(net(torch.float32), loss, [(x.float(), t) for x, t in batches])
    alone = Problem(net(torch.bfloat16), loss, batches, cache=0, verify=False)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    own = batches[rank * 4 // size : (rank + 1) * 4 // size]
    if kind == "parameters":
        problem = Problem(net(torch.bfloat16), loss, own, group=group, shard="parameters")
    else:
        from torch.distributed.device_mesh import DeviceMesh

        mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=(kind,))
        module = _sharded(net(torch.bfloat16), mesh) if kind == "data" else _parallel(net(torch.bfloat16), mesh)
        problem = Problem(module, loss, own if kind == "data" else batches, group=mesh)
    v, expr = torch.randn(exact.size), parse("hessian + ggn")
    expected, index = expr.lower(exact) @ v, problem.layout.places()
    got, one = expr.lower(problem) @ v[index], expr.lower(alone) @ v
    return _error(got, expected, index), float((one - expected).norm() / expected.norm()), str(got.dtype)


def estimated(group: Any, kind: str) -> dict[str, float]:
    """Relative differences of what solvers and estimators find, of a model in parts and of the whole one."""
    problem, whole, index = cut(group, kind, "wide")
    hessian, damped = parse("hessian"), parse("ggn") + 0.1 * Identity
    b = vector(whole.size)
    questions: dict[str, Any] = {
        "eigsh": lambda p: est.eigsh(hessian.lower(p), 8, tol=1e-8).eigenvalues,
        "density": lambda p: est.spectral_density(hessian.lower(p), probes=4, steps=12).density,
        "trace": lambda p: est.trace(hessian.lower(p), products=30).value,
        "trace, Hutchinson": lambda p: est.trace(hessian.lower(p), products=30, method="hutchinson").value,
        "norm": lambda p: est.norm(hessian.lower(p)).value,
    }
    found: dict[str, float] = {}
    for name, ask in questions.items():
        expected, got = (torch.as_tensor(ask(p), dtype=torch.float64) for p in (whole, problem))
        found[name] = float((got - expected).norm() / expected.norm())
    found["diagonal"] = _error(
        est.diagonal(hessian.lower(problem), products=20).value,
        est.diagonal(hessian.lower(whole), products=20).value,
        index,
    )
    for solver in ("cg", "minres"):
        inverted = inverse(damped, solver=solver, rtol=1e-10)
        found[solver] = _error(inverted.lower(problem) @ b[index], inverted.lower(whole) @ b, index)
    exact = est.logdet(damped.lower(whole)).value
    estimate = est.logdet(damped.lower(problem), products=40)
    assert (
        abs(estimate.value - exact) <= 4 * estimate.error
    )  # one process takes the exact form, which there is none of in parts
    return found


def chosen(group: Any, kind: str) -> float:
    """The error of a product over some of the parameters."""
    problem, whole, _ = cut(group, kind, "mlp")
    names = ["0.weight", "3.*"]
    own = Problem(
        problem.model.module, problem.loss, problem.data.source, group=group, shard="parameters", params=names
    )  # type: ignore[union-attr]
    all_ = Problem(whole.model.module, whole.loss, whole.data.source, params=names)  # type: ignore[union-attr]
    v = vector(all_.size)
    index, expr = own.layout.places(), parse("hessian + covariance")
    return _error(expr.lower(own) @ v[index], expr.lower(all_) @ v, index)


def traffic(group: Any) -> tuple[int, int, int, int]:
    """Gathers and reduce-scatters of a product, and their bytes, of a deep network of layers of one size."""
    import torch.distributed as dist

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    net = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.Tanh())))
    X, y = torch.randn(4, 8), torch.randn(4, 8)
    rank = dist.get_rank(group)
    problem = Problem(net, nn.MSELoss(), (X[rank : rank + 1], y[rank : rank + 1]), group=group, shard="parameters")
    op, v = parse("hessian").lower(problem), torch.randn(problem.size)
    op @ v
    before = copy.deepcopy(problem.group.traffic)  # type: ignore[attr-defined]
    op @ v
    now = problem.group.traffic  # type: ignore[attr-defined]
    gathers, scatters = now.gathers, now.reduce_scatters
    return (
        gathers.calls - before.gathers.calls,
        scatters.calls - before.reduce_scatters.calls,
        gathers.bytes - before.gathers.bytes,
        scatters.bytes - before.reduce_scatters.bytes,
    )


def most_whole(group: Any, text: str = "hessian", made: bool = True) -> tuple[int, int]:
    """The most bytes of whole weights that are alive at a time in a product, and those of one unit.

    Args:
        group: the processes.
        text: of the matrix.
        made: whether the product is not the first one, which makes the matrix.
    """
    import torch.distributed as dist

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    net = nn.Sequential(*(layer for _ in range(10) for layer in (nn.Linear(16, 16), nn.Tanh())))
    rank, alive, most = dist.get_rank(group), [0], [0]
    X, y = torch.randn(4, 16), torch.randn(4, 16)
    problem = Problem(net, nn.MSELoss(), (X[rank : rank + 1], y[rank : rank + 1]), group=group, shard="parameters")
    op, v = parse(text).lower(problem), torch.randn(problem.size)
    if made:
        op @ v
    weights: Any = problem.model.weights  # type: ignore[union-attr]
    gathered = weights._gathered

    def gone(nbytes: int) -> None:
        alive[0] -= nbytes

    def watched(*args: Any) -> Any:
        found = gathered(*args)
        for t in found.tensors:
            storage = t.untyped_storage()
            alive[0] += storage.nbytes()
            weakref.finalize(storage, gone, storage.nbytes())
        most[0] = max(most[0], alive[0])
        return found

    weights._gathered = watched
    op @ v
    return most[0], 8 * (16 * 16 + 16)


def by_differences(group: Any, kind: str, model: str) -> tuple[float, float]:
    """The error of this process's numbers of ``hessian_fd`` against the whole Hessian, and of its columns one by one."""
    problem, whole, index = cut(group, kind, model)
    V = torch.stack([vector(whole.size), 1e-20 * vector(whole.size, 6)], 1)
    wanted = parse("hessian").lower(whole) @ V
    op = parse("hessian_fd").lower(problem)
    got = op @ V[index]
    errors = [_error(got[:, i], wanted[:, i], index) for i in range(2)]
    assert "estimated error" in op.explain()
    return errors[0], errors[1]

"""What goes wrong on one of several processes, on purpose."""

from __future__ import annotations

import os
import random
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from curvalg import Identity, Problem, inverse, parse, registry
from curvalg import estimate as est
from tests.support.rank_quantities import columns, of_one_process, of_processes, shared
from tests.support.ranks import Failed, failed

build = registry.build


def outcome(attempt: Callable[[], Any]) -> Any:
    """What an attempt gives, or what it raises."""
    try:
        return attempt()
    except BaseException as error:
        return failed(error)


# -- mistakes of users ----------------------------------------------------------------------------------------------------


def _net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def _data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(19, 6, generator=g, dtype=torch.float64), torch.randint(0, 3, (19,), generator=g)


def _problem(group: Any, rank: int, model: nn.Module | None = None, **options: Any) -> Problem:
    X, y = _data()
    cut = slice(0, 10) if rank == 0 else slice(10, 19)
    return Problem(
        model or _net(), options.pop("loss", nn.CrossEntropyLoss()), (X[cut], y[cut]), group=group, **options
    )


def _unseeded(group: Any, rank: int) -> Any:
    problem = _problem(group, rank)
    return build("hessian").lower(problem) @ torch.randn(
        problem.size, generator=torch.Generator().manual_seed(rank), dtype=torch.float64
    )


def _scipy(group: Any, rank: int) -> Any:
    import numpy as np
    import scipy.sparse.linalg as sla

    op = build("hessian").lower(_problem(group, rank))
    return sla.eigsh(op, k=2, v0=np.random.default_rng(rank).standard_normal(op.shape[0]))


def _other_weights(group: Any, rank: int) -> Any:
    return build("hessian").lower(_problem(group, rank, _net(rank))) @ columns(83)


def _other_buffers(group: Any, rank: int) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).double().eval()
    net[1].running_mean += rank
    return _problem(group, rank, net).gradient()


def _training(group: Any, rank: int) -> Any:
    net = _net().append(nn.Dropout(0.0)).train(rank == 0)
    return build("hessian").lower(_problem(group, rank, net, randomness="frozen")) @ columns(83)


def _other_options(group: Any, rank: int) -> Any:
    return _problem(group, rank, samples="item" if rank == 0 else "position")


def _other_loss(group: Any, rank: int) -> Any:
    return _problem(group, rank, loss=nn.CrossEntropyLoss(reduction="mean" if rank == 0 else "sum"))


def _other_class_weights(group: Any, rank: int) -> Any:
    weight = torch.tensor([1.0, 1.0, 1.0 + rank], dtype=torch.float64)
    return _problem(group, rank, loss=nn.CrossEntropyLoss(weight=weight)).value()


def _sampled(group: Any, rank: int, **options: Any) -> Any:
    data = TensorDataset(*_data())
    sampler = DistributedSampler(data, num_replicas=2, rank=rank, **options)
    return Problem(_net(), nn.CrossEntropyLoss(), DataLoader(data, batch_size=4, sampler=sampler), group=group)


def _sampled_alone(group: Any, rank: int) -> Any:
    return _sampled(None, rank, shuffle=False)


def _ddp_alone(group: Any, rank: int) -> Any:
    X, y = _data()
    net = nn.parallel.DistributedDataParallel(_net(), process_group=group)
    return Problem(net, nn.CrossEntropyLoss(), (X, y))


def _not_finite(group: Any, rank: int) -> Any:
    X, y = _data()
    X[15, 0] = float("nan")
    cut = slice(0, 10) if rank == 0 else slice(10, 19)
    return build("hessian").lower(Problem(_net(), nn.CrossEntropyLoss(), (X[cut], y[cut]), group=group)) @ columns(83)


def _stale(group: Any, rank: int) -> Any:
    problem = _problem(group, rank)
    op = build("hessian").lower(problem)
    _ = op @ columns(83)
    if rank:
        with torch.no_grad():
            next(iter(problem.layout.unflatten(torch.zeros(83))))
            problem.model.module[0].weight[0, 0] += 1
    return op @ columns(83)


def _different_calls(group: Any, rank: int) -> Any:
    problem = _problem(group, rank)
    op = build("hessian").lower(problem)
    return problem.value() if rank else op @ columns(83)


def _different_terms(group: Any, rank: int) -> Any:
    problem = _problem(group, rank)
    op = build("hessian" if rank else "ggn_class").lower(problem)
    return op @ columns(83)


def _other_columns(group: Any, rank: int) -> Any:
    op = build("hessian").lower(_problem(group, rank))
    return op @ columns(83, 2 + rank)


def _wrong_shape(group: Any, rank: int) -> Any:
    op = build("hessian").lower(_problem(group, rank))
    return op @ columns(83 + rank)


def _all_empty(group: Any, rank: int) -> Any:
    return Problem(_net(), nn.CrossEntropyLoss(), [], group=group).value()


def _all_data(group: Any, rank: int) -> Any:
    return Problem(_net(), nn.CrossEntropyLoss(), _data(), group=group).value()


def _all_data_by_loader(group: Any, rank: int) -> Any:
    loader = DataLoader(TensorDataset(*_data()), batch_size=4)
    return Problem(_net(), nn.CrossEntropyLoss(), loader, group=group).value()


def _other_activation(group: Any, rank: int) -> Any:
    net = _net()
    net[1] = nn.Tanh() if rank else nn.ReLU()
    return _problem(group, rank, net).gradient()


def _other_hook(group: Any, rank: int) -> Any:
    net = _net()
    net[1].register_forward_hook(lambda module, given, output: output * (1 + rank))
    return _problem(group, rank, net).gradient()


def _other_smoothing(group: Any, rank: int) -> Any:
    return _problem(group, rank, loss=nn.CrossEntropyLoss(label_smoothing=0.5 * rank)).value()


def _other_closure(group: Any, rank: int) -> Any:
    factor = 1.0 + rank
    return _problem(group, rank, loss=lambda z, y: factor * nn.functional.cross_entropy(z, y)).value()


def _other_coefficient(group: Any, rank: int) -> Any:
    return (2.0**rank * build("ggn")).lower(_problem(group, rank)) @ columns(83)


def _other_damping(group: Any, rank: int) -> Any:
    return inverse(build("kfac") + 1e-2 * (1 + rank) * Identity).lower(_problem(group, rank)) @ columns(83)


def _moved(net: nn.Module, rank: int) -> None:
    """Move a layer to another parent, which computes the same, on rank 1."""
    if rank:
        net[1].append(net[0].pop(1))


def _three_parts(second: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(6, 8), second), nn.Sequential(), nn.Linear(8, 3)).double()


def _moved_layer(group: Any, rank: int) -> Any:
    problem = _problem(group, rank, net := _three_parts(nn.Linear(8, 8)))
    _moved(net, rank)
    return problem.with_data(problem.data.source).gradient()


def _moved_activation(group: Any, rank: int) -> Any:
    problem = _problem(group, rank, net := _three_parts(nn.Softplus()))
    _ = build("kfac").lower(problem) @ columns(83)
    _moved(net, rank)
    return build("kfac").lower(problem) @ columns(83)


def _other_rank_of_queries(group: Any, rank: int) -> Any:
    problem = _problem(group, rank)
    op = inverse(build("kfac") + 1e-2 * Identity).lower(problem)
    return est.influence(op, problem, query_batch=3 + rank)


def _other_probes(group: Any, rank: int) -> Any:
    return est.trace(build("hessian").lower(_problem(group, rank)), products=20 + rank)


TRAPS: dict[str, tuple[Callable[[Any, int], Any], str]] = {
    "vectors from unseeded generators": (_unseeded, "multiply different vectors"),
    "scipy's start vector": (_scipy, "v0="),
    "other weights": (_other_weights, "0.weight"),
    "other buffers": (_other_buffers, "running_mean"),
    "one rank in training mode": (_training, "training flags"),
    "other options": (_other_options, "samples="),
    "another reduction": (_other_loss, "the loss"),
    "other class weights": (_other_class_weights, "loss.weight"),
    "a sampler that pads": (lambda g, r: _sampled(g, r, shuffle=False), "curvalg.distributed.shard"),
    "a sampler that drops": (lambda g, r: _sampled(g, r, shuffle=False, drop_last=True), "curvalg.distributed.shard"),
    "a sampler that shuffles": (lambda g, r: _sampled(g, r), "curvalg.distributed.shard"),
    "a sampler without a group": (_sampled_alone, "no group= was given"),
    "DistributedDataParallel without a group": (_ddp_alone, "no group= was given"),
    "NaN on one rank": (_not_finite, "NaN"),
    "one rank's model changes": (_stale, "changed after the operator was lowered"),
    "other calls": (_different_calls, "same calls"),
    "other terms": (_different_terms, ""),
    "other numbers of columns": (_other_columns, ""),
    "a wrong shape on one rank": (_wrong_shape, "expected shape"),
    "another activation": (_other_activation, "outputs of the same rows"),
    "a layer that moved to another parent": (_moved_layer, "parameter '0.1.weight' is gone"),
    "an activation that moved to another parent": (_moved_activation, "names of submodules"),
    "another hook": (_other_hook, "outputs of the same rows"),
    "another smoothing": (_other_smoothing, "losses of the same rows"),
    "another closure": (_other_closure, "losses of the same rows"),
    "another coefficient": (_other_coefficient, "the expression"),
    "another damping": (_other_damping, "the expression"),
    "other options of influence": (_other_rank_of_queries, "query_batch="),
    "other options of an estimator": (_other_probes, "products="),
    "all data on each rank": (_all_data, "curvalg.distributed.shard"),
    "all data on each rank, by a loader": (_all_data_by_loader, "curvalg.distributed.shard"),
    "no data at all": (_all_empty, "empty"),
}


def trapped(group: Any, name: str) -> tuple[Any, float]:
    """What a mistake gives, and the error of a product on the same group after it."""
    import torch.distributed as dist

    rank = dist.get_rank(group)
    found = outcome(lambda: TRAPS[name][0](group, rank))
    return (found if isinstance(found, Failed) else "no error"), after(group)


def two_groups(group: Any) -> tuple[Any, float]:
    """What comes where rank 0 passes one process group and the others another of the same ranks; and the error after it."""
    import torch.distributed as dist

    rank, both = dist.get_rank(group), [dist.new_group(list(range(dist.get_world_size(group)))) for _ in range(2)]
    found = outcome(lambda: _problem(both[min(rank, 1)], rank))
    return (found if isinstance(found, Failed) else "no error"), after(group)


def after(group: Any) -> float:
    """The error of a product by the same processes."""
    expected, got = of_one_process("weighted", "hessian"), of_processes(group, "weighted", "hessian")
    return float((got - expected).norm() / expected.norm())


# -- faults of one rank ---------------------------------------------------------------------------------------------------


class Planted(Exception):
    """A fault that a test has planted."""


@contextmanager
def at_exchange(group: Any, number: int, what: Callable[[], None]) -> Iterator[None]:
    """A context in which a rank does something just before its exchange of a number."""
    before, count = group._frame, [0]

    def frame(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == number:
            what()
        return before(*args, **kwargs)

    group._frame = frame
    try:
        yield
    finally:
        group._frame = before


def _raise() -> None:
    raise Planted("planted")


JOBS: list[Callable[[Problem], Any]] = [
    lambda p: p.gradient(),
    lambda p: build("hessian").lower(p) @ columns(p.size),
    lambda p: build("ggn_class").lower(p) @ columns(p.size),
    lambda p: parse("kfac").lower(p) @ columns(p.size),
    lambda p: inverse(build("kfac") + 1e-2 * Identity).lower(p) @ columns(p.size),
    lambda p: inverse(build("ggn") + 1e-2 * Identity).lower(p) @ columns(p.size),
    lambda p: inverse(build("ggn") + 1e-2 * Identity, solver="cg").lower(p) @ columns(p.size, 1),
    lambda p: build("jacobian").lower(p) @ columns(p.size),
    lambda p: est.trace(build("hessian").lower(p), products=20),
    lambda p: est.eigsh(build("hessian").lower(p), 2),
    lambda p: est.spectral_density(build("hessian").lower(p), probes=2, steps=5),
    lambda p: est.gradient_noise(p),
]


def injected(group: Any, count: int) -> list[tuple[bool, bool]]:
    """Faults at random exchanges: whether each was met, and whether this rank got an error; all ranks draw alike."""
    import torch.distributed as dist

    draw, rank, size = random.Random(7), dist.get_rank(group), dist.get_world_size(group)
    several = shared(group, "wide")
    found = []
    for _ in range(count):
        job, guilty, number = draw.choice(JOBS), draw.randrange(size), draw.randint(1, 12)
        several.refresh()
        met = [False]

        def fault(met: list[bool] = met) -> None:
            met[0] = True
            _raise()

        with at_exchange(several.group, number if rank == guilty else -1, fault):
            got = outcome(lambda job=job: job(several))
        every: list[Any] = [None] * size
        dist.all_gather_object(every, met[0], group=group)
        found.append((any(every), isinstance(got, Failed)))
    return found


def nested(group: Any) -> tuple[Any, float]:
    """A fault on rank 1 inside of a problem that another one asks; and the error of a product after it."""
    import torch.distributed as dist

    outer = shared(group, "weighted")
    inner = shared(group, "squares")

    def job() -> None:
        with outer.group.together("outer"):
            inner.gradient()

    with at_exchange(inner.group, 1 if dist.get_rank(group) == 1 else -1, _raise):
        found = outcome(job)
    return found, after(group)


def interrupted(group: Any, number: int, path: str | None = None) -> tuple[bool, int, Tensor]:
    """A density that rank 1 interrupts with Ctrl-C at an exchange: whether it is partial, products, and its nodes."""
    import torch.distributed as dist

    several = shared(group, "wide")
    op = build("hessian").lower(several)
    stop = number if dist.get_rank(group) == 1 else -1
    with at_exchange(several.group, stop, lambda: signal.raise_signal(signal.SIGINT)):
        density = est.spectral_density(op, probes=6, steps=12, checkpoint=path)
    return density.partial, density.products, density.nodes


def _estimated(problem: Problem, estimator: str, path: str | None) -> Tensor:
    op = build("hessian").lower(problem)
    if estimator == "density":
        return est.spectral_density(op, probes=6, steps=12, checkpoint=path).nodes
    if estimator == "eigsh":
        return est.eigsh(op, 3, tol=1e-10, block=1, checkpoint=path, on_fail="warn").eigenvalues
    if estimator == "trace":
        given = {"products": 8, "tol": 1e-3, "maxiter": 48, "on_fail": "warn", "method": "hutchinson"}
        return torch.tensor([est.trace(op, checkpoint=path, **given).value])
    # Of a matrix with one way to be multiplied: two runs that choose theirs by the clock have other last bits.
    damped, options = build("hessian") + 0.1 * Identity, {"rtol": 1e-10, "maxiter": 60, "on_fail": "warn"}
    solve = inverse(damped, solver="minres", **options).lower(problem)
    return solve.solve(columns(problem.size), checkpoint=path).x


def resumed(group: Any, path: str | None, estimator: str) -> Tensor:
    """The numbers of an estimator, from a file if it is there."""
    warnings.simplefilter("ignore")
    return _estimated(shared(group, "wide", columns="loop"), estimator, path)


def resumable(group: Any, path: str, number: int, what: Callable[[], None]) -> Tensor:
    """A density with a file, at one of whose exchanges something happens."""
    several = shared(group, "wide", columns="loop")
    with at_exchange(several.group, number, what):
        return _estimated(several, "density", path)


def stopped_early(group: Any, path: str, estimator: str, number: int) -> bool:
    """An estimator that is interrupted on rank 1, with a file; whether the file is there."""
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    several = shared(group, "wide", columns="loop")
    stop = number if dist.get_rank(group) == 1 else -1
    with at_exchange(several.group, stop, lambda: signal.raise_signal(signal.SIGINT)):
        _estimated(several, estimator, path)
    dist.barrier(group)
    return Path(path).exists()


def ended(group: Any, number: int, how: str) -> Any:
    """A job in which rank 1 is killed or stopped at an exchange."""
    import torch.distributed as dist

    several = shared(group, "wide")
    op = build("hessian").lower(several)
    kill = lambda: os.kill(os.getpid(), getattr(signal, how))
    with at_exchange(several.group, number if dist.get_rank(group) == 1 else -1, kill):
        return outcome(lambda: est.spectral_density(op, probes=6, steps=12))

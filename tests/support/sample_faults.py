"""What goes wrong on some of several processes where single samples are gone over."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvalg import Problem, registry
from curvalg import estimate as est
from curvalg_plugins.laplace import laplace
from curvalg_plugins.ntk import cross_kernel
from tests.support.rank_quantities import SETUPS, SPLITS
from tests.support.ranks import Failed, failed
from tests.support.sample_quantities import damped, shared_pair

ASKING: dict[str, Callable[[Problem, Problem], Any]] = {
    "influence": lambda p, q: est.influence(damped(p), q),
    "influence of products": lambda p, q: est.influence(damped(p, "ggn"), q),
    "influence by rank": lambda p, q: est.influence(damped(p), q, query_rank=2),
    "influence_stream": lambda p, q: list(est.influence_stream(damped(p), q)),
    "functional_variance": lambda p, q: est.functional_variance(damped(p), q),
    "functional_variance of products": lambda p, q: est.functional_variance(damped(p, "ggn"), q),
    "cross_kernel": lambda p, q: cross_kernel(q, p),
    "predict": lambda p, q: laplace(p, "kfac").predict(q),
}


def _of_each(change: Callable[[Tensor], Tensor]) -> Callable[[list[Any]], list[Any]]:
    return lambda batches: [tuple(map(change, batch)) for batch in batches]


CHANGES: dict[str, Callable[[list[Any]], list[Any]]] = {
    "order": _of_each(lambda t: t.flip(0)),
    "rows": _of_each(lambda t: t[:-1]),
    "inputs": _of_each(lambda t: t + 1 if t.is_floating_point() else t),
    "fewer batches": lambda batches: batches[:-1],
    "more batches": lambda batches: [*batches, batches[0]],
}
"""What the batches of queries of one process are instead."""


def asked_differently(group: Any, quantity: str, how: str) -> Failed | None:
    """What comes where the last rank asks for other rows, or for the same in another order, and how the next call ends."""
    import torch.distributed as dist

    training, queries = shared_pair(group, "weighted", "training")
    if dist.get_rank(group) == dist.get_world_size(group) - 1:
        queries = queries.with_data(CHANGES[how](queries.data.source))
    try:
        ASKING[quantity](training, queries)
    except Exception as error:
        training.value()  # all go on together
        return failed(error)
    return None


def fails_on_one(group: Any, quantity: str, split: str) -> Failed | None:
    """What comes where the model of one rank fails on one of its batches, in its turn."""
    import torch.distributed as dist

    training, queries = shared_pair(group, "weighted", split)
    op = damped(training, "ggn")
    op @ torch.ones(training.size, dtype=torch.float64)
    broken = queries if quantity != "self_influence" else training
    own = broken.model.rule
    rank, last = dist.get_rank(group), dist.get_world_size(group) - 1

    def rule(model: nn.Module, batch: Any) -> Any:
        if rank == last:
            raise RuntimeError("out of luck")
        return model(batch[0]) if own is None else own(model, batch)

    take = {
        "influence": lambda: est.influence(op, queries),
        "self_influence": lambda: est.self_influence(op),
        "functional_variance": lambda: est.functional_variance(op, queries),
    }[quantity]
    broken.model.rule = rule
    try:
        take()
    except Exception as error:
        broken.model.rule = own
        training.value()
        return failed(error)
    return None


def resumed(group: Any, folder: str, split: str) -> float:
    """How far scores that were interrupted and resumed are from those of one run."""
    import torch.distributed as dist

    training, queries = shared_pair(group, "weighted", split)
    op, file = damped(training), Path(folder) / f"{split}.run"
    expected = est.influence(op, queries, query_batch=2).scores
    calls = []

    def rule(model: nn.Module, batch: Any) -> Any:
        calls.append(1)
        if dist.get_rank(group) == 1 and len(calls) == middle:
            os.kill(os.getpid(), signal.SIGINT)
        return model(batch[0])

    middle = -1
    training.model.rule = rule
    for _ in range(2):  # the first is at a new state, of which more is asked
        calls.clear()
        est.influence(op, queries, query_batch=2)
    middle = len(calls) // 2
    calls.clear()
    part = est.influence(op, queries, query_batch=2, checkpoint=file)
    training.model.rule = None
    assert part.partial
    assert len(part.scores) < len(expected)
    dist.barrier(group)
    assert file.exists()
    whole = est.influence(op, queries, query_batch=2, checkpoint=file)
    assert not whole.partial
    return float((whole.scores - expected).norm() / expected.norm())


def other_lengths(group: Any) -> Failed | None:
    """What comes where the rows of one rank have another number of positions."""
    import torch.distributed as dist

    setup, rank = SETUPS["tokens"], dist.get_rank(group)
    cut = [tuple(t[:, : 5 - rank] for t in batch) for batch in setup.batches()[slice(*SPLITS[2][rank])]]
    model, loss = setup.model(), setup.loss()
    training = Problem(model, loss, cut, group=group)
    queries = Problem(model, loss, setup.batches())
    try:
        est.influence(damped(training), queries, by="position")
    except Exception as error:
        training.value()
        return failed(error)
    return None


def other_processes(group: Any) -> list[Failed]:
    """What comes where queries are shared by other processes than the training samples."""
    import torch.distributed as dist

    rank = dist.get_rank(group)
    half = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    setup = SETUPS["weighted"]
    model, loss, batches = setup.model(), setup.loss(), setup.batches()
    training = Problem(model, loss, batches if rank == 1 else [], group=group)
    queries = Problem(model, loss, batches if rank % 2 else [], group=half)
    found = []
    op = registry.build("ggn").lower(training)
    takes = (
        lambda: est.influence(op, queries),
        lambda: est.functional_variance(op, queries),
        lambda: cross_kernel(queries, training),
    )
    for take in takes:
        try:
            take()
        except Exception as error:
            found.append(failed(error))
    return found

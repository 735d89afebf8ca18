"""Loaders and models of several processes, told from those of one: a part taken for the whole would be a wrong number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from curvalg.errors import ProblemError
from curvalg.problem.data.batches import Data

SHARD = (
    "pass data=curvalg.distributed.shard(dataset, batch_size=...), which gives each process a contiguous part, nothing twice "
    "and nothing left out"
)


def require_whole_data(model: object, data: Data) -> None:
    """Raise where a problem of one process is made of what several processes share.

    Raises:
        ProblemError: a model that is replicated over processes, or a loader that gives a part of the data.
    """
    replicated = isinstance(model, nn.parallel.DistributedDataParallel) and model.process_group.size() > 1
    if replicated:
        raise ProblemError(
            "the model is wrapped by DistributedDataParallel, so that each process has a part of the data, but no group= was "
            "given: every process would get another matrix. Pass group=torch.distributed.group.WORLD for that of all data, or "
            "model.module for this process alone"
        )
    for sampler in _samplers(data):
        if gives_a_part(sampler):
            raise ProblemError(
                f"the loader's {type(sampler).__name__} gives this process a part of the data, but no group= was given: every "
                f"process would get another matrix. Pass group=torch.distributed.group.WORLD, and {SHARD}"
            )


def require_shard(data: Data) -> None:
    """Raise for a loader that pads, drops or reorders the samples of several processes.

    Raises:
        ProblemError: it does.
    """
    for sampler in _samplers(data):
        if gives_a_part(sampler):
            raise ProblemError(
                f"the loader's {type(sampler).__name__} repeats samples or drops some to give each process as many, and takes "
                f"them in turn, so that the loss is not that of the data; {SHARD}"
            )


def gives_a_part(sampler: object) -> bool:
    """Whether a sampler gives one of several processes its part: torch's, or one of a library that wraps loaders."""
    if any(c.__name__ == "DistributedSampler" and c.__module__.startswith("torch.") for c in type(sampler).__mro__):
        return int(getattr(sampler, "num_replicas", 1)) > 1
    name, library = type(sampler).__name__, type(sampler).__module__.partition(".")[0]
    return library == "accelerate" and "Shard" in name and int(getattr(sampler, "num_processes", 1)) > 1


def _samplers(data: Data) -> Iterator[Any]:
    """The loader, its data set and its samplers, each inside of which may lie another."""
    todo, seen = [data.source], set[int]()
    while todo:
        thing = todo.pop()
        if thing is None or id(thing) in seen or isinstance(thing, (list, tuple, str)):
            continue
        seen.add(id(thing))
        yield thing
        todo += [getattr(thing, name, None) for name in ("sampler", "batch_sampler", "base_dataloader", "dataset")]

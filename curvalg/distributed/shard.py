"""A data set dealt out to processes: contiguous, in order, nothing twice and nothing left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader, Dataset, Subset

from curvalg.distributed.making import process_group
from curvalg.errors import ProblemError


def own_batches(count: int, group: Any = None) -> range:
    """The running numbers of this process's batches, of so many."""
    rank, size = process_group(group)
    return range(rank * count // size, (rank + 1) * count // size)


def shard(
    dataset: Any,
    batch_size: int,
    *,
    group: Any = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    num_workers: int = 0,
    **options: Any,
) -> Any:
    """A loader of this process's part of a data set, for ``Problem(..., group=group)``.

    Batches are those of one process with ``DataLoader(dataset, batch_size)``, dealt out in order: rank r of W has the batches
    from ⌊r B / W⌋ to ⌊(r + 1) B / W⌋ of B. So every sample is there once, the running numbers are those of one process, and so
    are the matrix and all that is drawn by them. A rank without a batch is allowed.

    Args:
        dataset: with ``len`` and indices, such as a ``TensorDataset``.
        batch_size: samples of a batch; the last one of the data set may be smaller.
        group: the process group; None: all processes.
        collate_fn, num_workers, options: of ``torch.utils.data.DataLoader``.

    Returns:
        A ``DataLoader`` in order; an empty list where there is no batch for this process.

    Raises:
        ProblemError: a data set without a length, a batch size below one, or an option that reorders or drops samples.

    >>> import torch
    >>> data = torch.utils.data.TensorDataset(torch.randn(10, 3), torch.randn(10, 1))
    >>> len(shard(data, batch_size=4))  # all of it, where there is one process
    3
    """
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ProblemError(f"batch_size is a number of samples ≥ 1, got {batch_size!r}")
    for name in ("shuffle", "drop_last"):
        if options.pop(name, False):
            raise ProblemError(
                f"{name}=True would make another matrix of every {'pass' if name == 'shuffle' else 'number of processes'}; "
                "leave it out"
            )
    if wrong := [name for name in ("sampler", "batch_sampler") if options.get(name) is not None]:
        raise ProblemError(f"{wrong[0]}= chooses the samples itself; leave it out, and pass a Subset for some of them")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ProblemError(
            f"expected a data set with a length and indices, got {type(dataset).__name__}; of an iterable one take every "
            "process's part yourself, in order, as a list of batches"
        )
    count = len(dataset)
    own = own_batches(-(-count // batch_size), group)
    if not own:
        return []
    part: Dataset[Any] = Subset(dataset, range(own.start * batch_size, min(count, own.stop * batch_size)))
    return DataLoader(part, batch_size, collate_fn=collate_fn, num_workers=num_workers, **options)

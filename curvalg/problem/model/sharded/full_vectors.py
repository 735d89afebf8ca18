"""Whole vectors, put together of the parts of all processes."""

from __future__ import annotations

import torch
from torch import Tensor

from curvalg.tensors.spaces.sharded_space import Exchanger

PORTION = 2**22
"""Numbers that travel at a time."""


def put_together(part: Tensor, places: Tensor, size: int, exchanger: Exchanger) -> Tensor | None:
    """The whole vectors of parts, on the CPU of the first process; None on the others.

    A portion at a time: each process has room for one beside its part, and the first one for the whole.

    Args:
        part: of this process, (n,) or (n, K).
        places: in the whole vector of each of its numbers, (n,) on the CPU; negative: another process has it, too.
        size: numbers of a whole vector.
        exchanger: of all processes.
    """
    columns = part.detach().reshape(len(part), -1)
    whole = columns.new_empty(size, columns.shape[1], device="cpu") if exchanger.rank == 0 else None
    order = places.argsort()
    ascending = places[order].contiguous()
    step = max(1, PORTION // max(1, columns.shape[1]))
    for start in range(0, size, step):
        stop = min(start + step, size)
        first, last = torch.searchsorted(ascending, torch.tensor([start, stop], device="cpu")).tolist()
        portion = columns.new_zeros(stop - start, columns.shape[1])
        own = order[first:last]
        portion[(ascending[first:last] - start).to(part.device)] = columns[own.to(part.device)]
        found = exchanger.sum(portion)  # nobody else has anything there: no number is rounded
        if whole is not None:
            whole[start:stop] = found.cpu()
    return None if whole is None else whole.reshape(size, *part.shape[1:])

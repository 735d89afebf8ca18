"""Where the rows of a sub-matrix lie among those of the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowRanges:
    """Rows by contiguous ranges, which are copied several times faster than by their indices.

    Args:
        ranges: one for each parameter, in the order of the block.
        outputs: of a joint block, a weight and its bias as the rows of [W | b]: the number of its rows; else 0.
    """

    ranges: tuple[slice, ...]
    outputs: int = 0

    def take(self, x: Tensor) -> Tensor:
        """The rows of x, shape (rows, ...); a view where they are one range."""
        parts = [x[at] for at in self.ranges]
        if self.outputs:
            both = [part.reshape(self.outputs, -1, *x.shape[1:]) for part in parts]
            return torch.cat(both, 1).flatten(0, 1)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def put(self, whole: Tensor, rows: Tensor) -> None:
        """Write rows to their places."""
        if self.outputs:
            weight, bias = self.ranges
            both = rows.reshape(self.outputs, -1, *rows.shape[1:])
            whole[weight].view(self.outputs, -1, *rows.shape[1:]).copy_(both[:, :-1])
            whole[bias] = both[:, -1]
            return
        start = 0
        for at in self.ranges:
            stop = start + at.stop - at.start
            whole[at] = rows[start:stop]
            start = stop

    def indices(self, device: torch.device) -> Tensor:
        """The same rows by number."""
        last = max((at.stop for at in self.ranges), default=0)
        return self.take(torch.arange(last, device=device))


def by_blocks(rows: Sequence[RowRanges], x: Tensor, function: Callable[[int, Tensor], Tensor]) -> Tensor:
    """A block-diagonal map of x (n, K): a function of (number of the block, its rows of x); zero where no block is."""
    result = torch.zeros_like(x)
    for number, places in enumerate(rows):
        places.put(result, function(number, places.take(x)))
    return result


def merged(slices: list[slice]) -> tuple[slice, ...]:
    """Ranges one after the other as fewer, where they touch."""
    found: list[slice] = []
    for s in slices:
        if found and found[-1].stop == s.start:
            found[-1] = slice(found[-1].start, s.stop)
        else:
            found.append(slice(s.start, s.stop))
    return tuple(found)

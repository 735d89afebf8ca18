"""Terms that only go wrong where several processes share the data, on purpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from curvalg import ProblemError
from tests.support.planted import GradientSquares


@dataclass(frozen=True)
class OwnRows(GradientSquares):
    """A mean over the rows that this process has met, where the matrix is a mean over all."""

    met: ClassVar[dict[tuple[float, ...], int]] = {}

    def accumulate(self, batch, prepared=None):
        self.met[tuple(batch.output.detach().reshape(-1).tolist())] = len(batch.output)
        return super().accumulate(batch, prepared)

    def finish(self, stats, layout, prepared=None):
        return super().finish({name: s / max(1, sum(self.met.values())) for name, s in stats.items()}, layout)


@dataclass(frozen=True)
class NeedsBatch(GradientSquares):
    """Reads in finish() what a batch has left."""

    left: ClassVar[list[int]] = []

    def accumulate(self, batch, prepared=None):
        self.left[:] = [1]
        return super().accumulate(batch, prepared)

    def finish(self, stats, layout, prepared=None):
        return super().finish({name: self.left[0] * s for name, s in stats.items()}, layout)


@dataclass(frozen=True)
class Refuses(GradientSquares):
    """Is made for one process."""

    seen: ClassVar[list[bool]] = []

    def finish(self, stats, layout, prepared=None):
        import torch.distributed as dist

        if dist.is_initialized():
            raise ProblemError("refuses: all data in one process, please")
        return super().finish(stats, layout)


class Unpicklable(GradientSquares):
    """Holds a function."""

    def __init__(self):
        object.__setattr__(self, "function", lambda: None)

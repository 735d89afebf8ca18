"""The trail of an iterative solve: states that it can be resumed from, or ended at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Mark:
    """The state of a solve between two iterations; nothing of it is written into afterwards.

    Args:
        tensors: by name.
        numbers: by name, what JSON can hold.
        history: residual norms of each iteration, a list that grows.
        length: how many of them belong to this state.
    """

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    history: list[Tensor]
    length: int


class Trail:
    """Remembers the last mark, and gives a solve the mark to start from.

    Args:
        start: of an earlier run, or None.
    """

    def __init__(self, start: Mark | None = None) -> None:
        self.start = self.last = start

    def mark(self, mark: Mark) -> None:
        """Remember a mark; called between iterations."""
        self.last = mark

    def close(self) -> None:
        """End the trail: no mark comes any more."""

    def part(self, number: int) -> Trail:
        """The trail of one of several solves, one after the other."""
        return Trail()

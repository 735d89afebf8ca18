"""The contract of a plan: an expression on a problem before any number is computed."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from curvalg.problem import Snapshot
from curvalg.problem.kept.reads import Reads, together


class Plan(ABC):
    """How one operator is applied at a snapshot."""

    @abstractmethod
    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        """The product with x (n, K), shape (m, K)."""

    @abstractmethod
    def lines(self, snapshot: Snapshot) -> list[str]:
        """The plan for people, a line each, nested by indentation."""

    @property
    def inner(self) -> tuple[Plan, ...]:
        """The plans inside this one."""
        return ()

    def dense(self, snapshot: Snapshot) -> Tensor | None:
        """The matrix, where there is a cheaper way than products with unit vectors."""
        return None

    def prepare(self, snapshot: Snapshot) -> None:
        """Make the passes over the data that the first product would make."""
        for part in self.inner:
            part.prepare(snapshot)

    def release(self, snapshot: Snapshot) -> None:
        """Drop what sweeps keep; they record anew if they are needed."""
        for part in self.inner:
            part.release(snapshot)

    def reads(self, snapshot: Snapshot, columns: int) -> Reads | str:
        """What products with so many columns read from kept memory, or why they are not the same kernels each time."""
        if not self.inner:
            return "which the plan does not allow"
        return together(part.reads(snapshot, columns) for part in self.inner)

    @property
    def passes(self) -> int:
        """The number of passes over the recordings that one product takes."""
        return sum(part.passes for part in self.inner)

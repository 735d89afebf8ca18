"""The memory that a problem may use to keep things between products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol
from weakref import ref


class Keeper(Protocol):
    """Something that keeps memory and can be asked to give it up."""

    nbytes: int

    def drop(self) -> None:
        """Release what is kept."""


FRACTION = 1 / 4
"""The part of the memory that is free when a problem is made, that it may keep things in by itself."""


class Budget:
    """A limit in bytes, shared by all that a problem (and its restrictions) keeps; the least recently used gives way.

    Args:
        limit: in bytes; 0 keeps nothing.
        free: tells what is free now, where the limit was not the user's: of what is free nothing is taken that would
            leave less than as much again.
    """

    def __init__(self, limit: int, free: Callable[[], int] | None = None) -> None:
        self.limit = limit
        self.free = free
        self._order: list[ref[Keeper]] = []

    def resize(self, limit: int, free: Callable[[], int] | None = None) -> None:
        """Another limit from now on; what no longer fits is dropped."""
        self.limit, self.free = limit, free
        for r in list(self._order):
            if self.used > limit and (keeper := r()) is not None:
                keeper.drop()

    def touch(self, keeper: Keeper) -> None:
        """Mark as used just now."""
        if self._order and self._order[-1]() is keeper:
            return
        self._order = [r for r in self._order if r() is not None and r() is not keeper]
        self._order.append(ref(keeper))

    @property
    def used(self) -> int:
        """Bytes kept now."""
        return sum(keeper.nbytes for r in self._order if (keeper := r()) is not None)

    def reserve(self, keeper: Keeper, nbytes: int) -> bool:
        """Whether so many more bytes may be kept; others are dropped to make room, the keeper itself is not."""
        if nbytes > self.limit - keeper.nbytes:
            return False
        if self.free is not None and nbytes > self.free():  # what is to be kept is there already
            return False
        for r in list(self._order):
            if self.used + nbytes <= self.limit:
                break
            other = r()
            if other is not None and other is not keeper:
                other.drop()
        self.touch(keeper)
        keeper.nbytes += nbytes
        return True

"""What a problem keeps between products, and the memory that this may take."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Protocol, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet, ref

import optree
from torch import Tensor

T = TypeVar("T")


class Keeper(Protocol):
    """Something that keeps memory and can be asked to give it up."""

    nbytes: int

    def drop(self) -> None:
        """Release the memory that is kept."""


FRACTION = 1 / 4
"""The part of the memory that is free when a problem is made, that it may keep things in by itself."""
WORKSPACE, WORKSPACE_SHARE = 2 * 2**30, 1 / 8
"""Bytes that a matrix of few directions may take where nothing is to be kept between products; on a GPU a share, if more."""


class Budget:
    """A limit in bytes, shared by all that a problem (and its restrictions) keeps; the least recently used gives way.

    Args:
        limit: in bytes; 0 keeps nothing.
        free: gives what is free now, where the limit was not the user's: of what is free nothing is taken that would
            leave less than as much again.
    """

    def __init__(self, limit: int, free: Callable[[], int] | None = None) -> None:
        self.limit = limit
        self.free = free
        self._order: list[ref[Keeper]] = []
        self._dependent: WeakKeyDictionary[Keeper, WeakSet[Keeper]] = WeakKeyDictionary()

    def depends(self, keeper: Keeper, others: Iterable[Keeper]) -> None:
        """Note that something holds memory of others, so that it has to go with them."""
        for other in others:
            self._dependent.setdefault(other, WeakSet()).add(keeper)

    def _drop(self, keeper: Keeper) -> None:
        for dependent in self._dependent.pop(keeper, ()):
            dependent.drop()
        keeper.drop()

    def resize(self, limit: int, free: Callable[[], int] | None = None) -> None:
        """Set another limit; what no longer fits is dropped."""
        self.limit, self.free = limit, free
        for r in list(self._order):
            if self.used > limit and (keeper := r()) is not None:
                self._drop(keeper)

    def touch(self, keeper: Keeper) -> None:
        """Mark something as used just now."""
        if self._order and self._order[-1]() is keeper:
            return
        self._order = [r for r in self._order if r() is not None and r() is not keeper]
        self._order.append(ref(keeper))

    @property
    def used(self) -> int:
        """The number of bytes kept now."""
        return sum(keeper.nbytes for r in self._order if (keeper := r()) is not None)

    def reserve(self, keeper: Keeper, nbytes: int) -> bool:
        """Whether so many more bytes may be kept; others are dropped to make room, but not the keeper itself."""
        if nbytes > self.limit - keeper.nbytes:
            return False
        if self.free is not None and nbytes > self.free():  # what is to be kept is there already
            return False
        for r in list(self._order):
            if self.used + nbytes <= self.limit:
                break
            other = r()
            if other is not None and other is not keeper:
                self._drop(other)
        self.touch(keeper)
        keeper.nbytes += nbytes
        return True


class CacheEntry:
    """A value (a pytree of tensors) that the budget may ask back; it is made again when needed."""

    def __init__(self) -> None:
        self.value: Any = None
        self.nbytes = 0

    def drop(self) -> None:
        """Release the kept value."""
        self.value, self.nbytes = None, 0


class Cache:
    """Values kept at one state by kind and key, each made once.

    Args:
        budget: for values that are kept only as long as there is room.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._values: dict[tuple[str, Hashable], Any] = {}

    def get(self, kind: str, key: Hashable, make: Callable[[], T], *, budgeted: bool = False) -> T:
        """The value under a key: the kept one, or else one made now.

        Args:
            kind: of things.
            key: of the one.
            make: makes it.
            budgeted: whether it is kept only where the budget has room, and given up for what is used later.
        """
        place = kind, key
        if budgeted:
            return self._within_budget(self._values.setdefault(place, CacheEntry()), make)
        if place not in self._values:
            self._values[place] = make()
        return cast("T", self._values[place])

    def _within_budget(self, entry: CacheEntry, make: Callable[[], T]) -> T:
        if entry.value is not None:
            self.budget.touch(entry)
            return cast("T", entry.value)
        value = make()
        leaves: list[Any] = optree.tree_leaves(cast("Any", value))
        nbytes = sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))
        if self.budget.reserve(entry, nbytes):
            entry.value = value
        return value

    def put(self, kind: str, key: Hashable, value: Any) -> None:
        """Keep a value that was made with others."""
        self._values[kind, key] = value

    def found(self, kind: str, key: Hashable) -> Any:
        """The value under a key, or None."""
        return self._values.get((kind, key))

    def missing(self, kind: str, keys: Iterable[T]) -> list[T]:
        """The keys, each once, under which nothing is kept."""
        return [key for key in dict.fromkeys(keys) if (kind, key) not in self._values]

    def keys(self, *kinds: str) -> list[tuple[str, Any]]:
        """All (kind, key) under which values of the given kinds are kept."""
        return [place for place in self._values if place[0] in kinds]

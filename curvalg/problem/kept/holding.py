"""Explicit results that are kept on the problem between operators, within its budget."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import optree
from torch import Tensor

from curvalg.problem import Problem, Snapshot

T = TypeVar("T")


class CacheEntry:
    """A value (a pytree of tensors) that the budget may ask back; it is made again when needed."""

    def __init__(self) -> None:
        self.value: Any = None
        self.nbytes = 0

    def drop(self) -> None:
        """Release the value."""
        self.value, self.nbytes = None, 0


def held(problem: Problem, snapshot: Snapshot, key: Hashable, make: Callable[[], T]) -> T:
    """The value under a key at a snapshot: the kept one, else made now, and kept if the budget has room."""
    kept = problem.kept(snapshot)
    holder: CacheEntry = kept.setdefault(("held", key), CacheEntry())
    if holder.value is None:
        value = make()
        leaves: list[Any] = optree.tree_leaves(cast("Any", value))
        nbytes = sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))
        if problem.budget.reserve(holder, nbytes):
            holder.value = value
        return value
    problem.budget.touch(holder)
    return cast("T", holder.value)

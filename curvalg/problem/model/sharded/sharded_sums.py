"""Sums over processes of what each made of its data, where vectors over the parameters lie in parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from curvalg.distributed.group import Group
from curvalg.tensors import trees
from curvalg.tensors.partial_tensors import PartOfVector


def sum_of_parts(group: Group, values: list[Any], size: int) -> list[Any]:
    """The sums over processes of pytrees, but for parts of vectors, which are of the data of all processes already.

    Args:
        group: the processes.
        values: of this process.
        size: numbers of a vector on this process.
    """

    def is_own(t: Tensor) -> bool:
        return isinstance(t, PartOfVector) and t.ndim > 0 and t.shape[-1] == size

    shared = [t.as_subclass(Tensor) for t in trees.tensors(values) if not is_own(t)]
    found = iter(group.sum(shared))
    result: list[Any] = trees.tensor_map(lambda t: t.as_subclass(Tensor) if is_own(t) else next(found), values)
    return result

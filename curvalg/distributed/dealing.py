"""Work that every process could do, done by one and sent to the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from curvalg.distributed.group import active

T = TypeVar("T")


def owners(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that each of some tasks goes to: the largest first, each to the one that has the least by then.

    >>> owners([3, 1, 2, 2], ranks=2)
    [0, 0, 1, 1]
    """
    chosen, loads = [0] * len(costs), [0.0] * ranks
    for number in sorted(range(len(costs)), key=lambda i: -costs[i]):
        chosen[number] = min(range(ranks), key=loads.__getitem__)
        loads[chosen[number]] += costs[number]
    return chosen


def dealt(tasks: Sequence[Callable[[], T]], costs: Sequence[float]) -> list[T]:
    """The results of independent tasks, dealt out to the processes that share the problem at hand.

    For :meth:`curvalg.MatrixTerm.settle` and other code that all processes run alike, such as eigendecompositions of the
    factors of many layers. Each task runs on one process; the others get its bits, so that none depends on whose computer it
    is. Where there is one process, or no problem at hand, it runs all of them.

    Args:
        tasks: functions that give tensors, or structures of them.
        costs: how long each takes, in any unit.

    Returns:
        The results, in the order of the tasks, on every process.

    Raises:
        GroupError: a task failed on another process.

    >>> import torch
    >>> dealt([lambda: torch.linalg.eigvalsh(torch.eye(2)), lambda: torch.ones(1)], costs=[8, 1])
    [tensor([1., 1.]), tensor([1.])]
    """
    return active().dealt(tasks, costs)

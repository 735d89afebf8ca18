"""The processes that share one problem: every number that crosses the border of a process does so here."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from curvalg.errors import ProblemError

T = TypeVar("T")
P = ParamSpec("P")


class Group:
    """The group of one process, in which every exchange gives back what it is given.

    Attributes:
        rank: of this process.
        size: the number of processes.
        alone: whether there is one process only.
        sharded: whether each holds a part of the parameters, and of vectors, rather than all.
        headers, payloads, bytes: how many exchanges there were, those whose payload did not fit the frame, and their bytes.
    """

    rank, size, alone, sharded = 0, 1, True, False

    @property
    def vectors(self) -> Group:
        """The exchanges of sums over the numbers of vectors."""
        return self

    def __init__(self) -> None:
        self.headers = self.payloads = self.bytes = 0

    def together(self, what: object) -> AbstractContextManager[None]:
        """A context around what all ranks do together: an error inside is an error on all of them.

        Args:
            what: for messages.
        """
        return nullcontext()

    def telling(self) -> AbstractContextManager[None]:
        """A context whose errors are told to the other ranks, unless they know already; they raise at their next exchange."""
        return nullcontext()

    def at(self, state: object, digests: Callable[[], Mapping[str, int]]) -> None:
        """Set the state that the next exchanges are of, to be compared with that of the others.

        Args:
            state: the same object as long as it is the same state.
            digests: gives hashes of all that belongs to it, by name.
        """

    def multiplying(self, operand: Tensor) -> None:
        """Set the operand that the next exchange is of, to be compared with that of the others."""

    def sum(self, value: T) -> T:
        """The sum over ranks of a pytree of tensors, as one payload; None on a rank without data."""
        return value

    def sums(self, parts: Iterable[Tensor]) -> list[Tensor]:
        """The sums over ranks of tensors that are made one after the other; one travels while the next is made."""
        return list(parts)

    def gathered(self, own: Tensor) -> Tensor:
        """The buffers (n,) of all ranks, of one length on all of them: (ranks, n)."""
        return own[None]

    def scattered(self, parts: Tensor) -> Tensor:
        """The sum over ranks of the part for this rank, (n,), of parts (ranks, n) for each."""
        return parts[0]

    def largest(self, own: Tensor) -> Tensor:
        """The elementwise maximum over ranks; NaN where a rank has one."""
        return own

    def rows(self, local: Tensor | None, dim: int = 0) -> Tensor:
        """The rows of all ranks, one rank after the other; None on a rank without data."""
        assert local is not None  # one process has all of them
        return local

    def numbers(self, *own: float) -> list[list[float]]:
        """A few numbers of every rank."""
        return [list(own)]

    def clock(self) -> float:
        """Seconds on rank 0, for decisions that all ranks have to make alike."""
        return time.perf_counter()

    def every(self, own: bool) -> bool:
        """Whether something holds on all ranks."""
        return own

    def least(self, own: float) -> float:
        """The least of the numbers of all ranks."""
        return own

    def objects(self, own: T) -> list[T]:
        """Small objects of all ranks."""
        return [own]

    def first(self, own: T) -> T:
        """What rank 0 has: of whatever the clock, free memory or a file decides."""
        return own

    def of(self, rank: int, own: Any) -> Any:
        """What one rank has."""
        return own

    def dealt(self, tasks: Sequence[Callable[[], T]], costs: Sequence[float]) -> list[T]:
        """The results of tasks that all ranks have, each computed by one of them and sent to the others.

        Args:
            tasks: functions that give tensors, or structures of them.
            costs: how long each takes, in any unit; the longest are dealt out first, each to the rank with the least to do.
        """
        return [task() for task in tasks]

    def swapped(self, parts: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        """The parts that all ranks have for this one, (rows, K) of each rank.

        Args:
            parts: of this rank for each one, (n, K), the same K on all ranks.
            rows: of what comes from each one.
        """
        return list(parts)

    def handed_out(self, parts: Sequence[T]) -> list[T]:
        """What each rank has for this one, of structures of tensors that this rank has for each."""
        return list(parts)

    def agree(self, own: Mapping[str, Any], advice: str) -> None:
        """Raise on all ranks where they differ.

        Args:
            own: what has to be the same, by name.
            advice: what to do otherwise.
        """

    def alike(self, what: str, *own: Tensor | None) -> None:
        """Raise on all ranks where tensors that each computed for itself differ by more than rounding, or in their sizes.

        Args:
            what: they are of, for messages: data that every rank has whole.
            own: tensors of this rank; None: it has none left.
        """


_ALONE = Group()
_ACTIVE: ContextVar[Group] = ContextVar("processes that do something together", default=_ALONE)


def active() -> Group:
    """The processes that do at this moment something together; what is done for one problem need not be told whose they are."""
    return _ACTIVE.get()


@contextmanager
def activated(group: Group) -> Iterator[None]:
    """A context in which these processes do something together."""
    token = _ACTIVE.set(group)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


PLAIN = (bool, int, float, str, type(None))
"""Kinds of arguments that can be compared at once."""
OF_RANK_0 = ("checkpoint=", "progress=", "path=")
"""Arguments that are asked of one process only."""


def shared_call(function: Callable[P, T]) -> Callable[P, T]:
    """Have the processes of a problem call a function together; some argument is the problem, or has one."""

    name = function.__name__

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        group = group_of(*args, *kwargs.values())
        if group.alone:
            return function(*args, **kwargs)
        with group.together(name):
            given = {
                **{f"argument {i + 1} of {name}": a for i, a in enumerate(args)},
                **{f"{k}= of {name}": v for k, v in kwargs.items()},
            }
            plain = {k: v for k, v in given.items() if isinstance(v, PLAIN) and not k.startswith(OF_RANK_0)}
            group.agree(plain, "call it with the same arguments on all ranks")
            return function(*args, **kwargs)

    return call


def group_of(*subjects: Any) -> Group:
    """The processes that share some problems, or things that have one; those of one process aside.

    Raises:
        ProblemError: they are different ones.
    """
    found = (getattr(getattr(subject, "problem", subject), "group", None) for subject in subjects)
    groups = [group for group in found if isinstance(group, Group) and not group.alone]
    if len({(group.rank, group.size) for group in groups}) > 1:
        raise ProblemError("the problems are shared by different processes; give both one group=")
    return groups[0] if groups else _ALONE


def in_turns(group: Group, apply: Callable[[Tensor], Tensor], body: Callable[[Callable[[Tensor], Tensor]], T]) -> T:
    """What each rank makes of its own data with products that all ranks have to take part in: one rank after the other.

    Args:
        group: of the products.
        apply: the product, of the same columns on all ranks.
        body: what a rank does, given the product; it may take as many as it likes.
    """
    if group.alone:
        return body(apply)
    made: list[T] = []
    for rank in range(group.size):
        if rank == group.rank:
            made.append(body(lambda x: apply(group.of(group.rank, x))))
            group.of(rank, None)
            continue
        while (columns := group.of(rank, None)) is not None:
            apply(columns)
    return made[0]

"""Equal numbers of model calls on all processes, whose parts of the parameters come together in each call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from curvalg.problem.data.batches import ReadBatch
from curvalg.problem.setting import Setting


def filled(samples: Iterable[ReadBatch], most: int, borrowed: ReadBatch | None) -> Iterator[ReadBatch]:
    """The batches of this process, and then its last one without weight for each that another process has more.

    Args:
        samples: the batches.
        most: the most that a process has.
        borrowed: in place of the last one, where there is none.
    """
    count, last = 0, borrowed
    for sample in samples:
        yield sample
        count, last = count + 1, sample
    if count < most:
        assert last is not None  # who has no batch has borrowed one
        few = last.head(1)
        for number in range(count, most):
            yield replace(few, index=-1 - number, weightless=True)  # of no batch that there is


def filled_uncounted(problem: Setting) -> Iterator[ReadBatch]:
    """The same before anything was counted: by a pass of its own, which counts the batches."""
    calls, last = 0, None
    for sample in problem.read():
        calls, last = calls + 1, sample
    every = [int(n) for (n,) in problem.group.numbers(calls)]
    yield from filled(problem.read(), max(every), borrow(problem, last, every))


def borrow(problem: Setting, own: ReadBatch | None, calls: Sequence[int]) -> ReadBatch | None:
    """A batch of the first process that has one, where some process has none.

    Args:
        problem: of the processes.
        own: a batch of this process.
        calls: numbers of batches by process.
    """
    if all(calls):
        return None
    source = next((rank for rank, count in enumerate(calls) if count), None)
    if source is None:
        return None  # there are no data at all, which is refused by who counts
    sent = None if own is None or problem.group.rank != source else replace(own.head(1), start=0, index=-1)
    return problem.group.of(source, sent)  # type: ignore[no-any-return]

"""The runner of all resumable algorithms: progress, checkpoints, interruption."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

from tqdm.auto import tqdm

from curvalg.distributed.group import active
from curvalg.problem.kept.expected import Expected
from curvalg.runs.checkpoint import Checkpoint
from curvalg.runs.run_state import Algorithm, State
from curvalg.runs.unit import Outgrown


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run: its last state, and what it took.

    Args:
        state: the last complete one.
        seconds: of this run, and of those before it that it resumed.
        partial: whether it was interrupted.
    """

    state: State
    seconds: float
    partial: bool


def run(
    algorithm: Algorithm,
    *,
    checkpoint: Checkpoint | None = None,
    progress: bool = False,
    expected: Expected | None = None,
) -> Outcome:
    """Run an algorithm to its end, or until Ctrl-C.

    Args:
        algorithm: what is run.
        checkpoint: the file that the run is resumed from, where it exists, and written to.
        progress: show products done and expected.
        expected: is told before each step how many products are still expected.

    Returns:
        The last state. After Ctrl-C it is that of the last complete step; an interruption before the first step raises
        ``KeyboardInterrupt`` as usual, since there is nothing to return.

    Raises:
        CheckpointError: the file is of another run, damaged, or written by another run at this moment.
    """
    with contextlib.nullcontext() if checkpoint is None else checkpoint.held():
        return _run(algorithm, checkpoint, progress, expected or Expected())


def _run(algorithm: Algorithm, checkpoint: Checkpoint | None, progress: bool, expected: Expected) -> Outcome:
    begin, before, partial, whole = time.perf_counter(), 0.0, False, True
    saved = checkpoint.load(algorithm) if checkpoint is not None else None
    if saved is None:
        state = _started(algorithm)
    else:
        state, before = saved
    if checkpoint is not None:
        checkpoint.mark()

    def seconds() -> float:
        return before + time.perf_counter() - begin

    with tqdm(desc=algorithm.name, unit="product", disable=not progress or active().vectors.rank > 0) as bar:
        try:
            while not algorithm.done(state):
                try:
                    with expected.at_most(max(1, algorithm.expected(state) - state.products)):
                        state = algorithm.step(state)
                except Outgrown:
                    whole = False  # the state is in the old unit, and the next one is in the making
                    state, whole = _started(algorithm, state.products), True
                if checkpoint is not None:
                    checkpoint.mark()
                if progress:
                    bar.total = max(algorithm.expected(state), state.products)
                    bar.update(state.products - bar.n)
                if checkpoint is not None and checkpoint.due():
                    checkpoint.save(algorithm, state, seconds())
        except KeyboardInterrupt:
            if not whole:
                raise
            partial = True
    if checkpoint is not None and (saved is None or state is not saved[0]):
        checkpoint.save(algorithm, state, seconds())
    return Outcome(state, seconds(), partial)


def _started(algorithm: Algorithm, lost: int = 0) -> State:
    """The first state, after so many products that were in a unit too small; each new one is larger, so that it ends."""
    while True:
        with contextlib.suppress(Outgrown):
            state = algorithm.start()
            return State(state.tensors, {**state.numbers, "products": state.products + lost})

"""A run of the suite: contestants, limits, and the tasks one after the other."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cases import CASES
from benchmarks.effort import EFFORTS, Effort
from benchmarks.environment import describe
from benchmarks.peers import available
from benchmarks.peers.base import Peer
from benchmarks.results import Record, Results, Task
from benchmarks.workload import build, fair_attention

Report = Callable[[Record], None]


@dataclass(frozen=True)
class Session:
    """Who takes part, and how.

    Args:
        peers: contestants, the first is what the others are compared with.
        effort: rounds and limits.
        device: "cpu" or "cuda".
    """

    peers: Sequence[Peer]
    effort: Effort
    device: str = "cpu"
    _warm: set[tuple[str, str]] = field(default_factory=set)

    def warm_up(self, peer: Peer, question: str) -> None:
        """Answer on a tiny model once: on first use libraries import parts of torch, which is nobody's time."""
        if (peer.name, question) not in self._warm:
            self._warm.add((peer.name, question))
            workload = build("tiny", EFFORTS["quick"].sizes, self.device)
            with workload.closing, suppress(Exception):  # what is broken breaks again where it is reported
                run = peer.prepare(question, workload)
                if run is not None:
                    run()


@contextmanager
def quiet() -> Iterator[None]:
    """Warnings of libraries about their own insides are not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tasks(cases: Sequence[str], models: Sequence[str] | None, effort: Effort) -> Iterator[Task]:
    """All that is to be done, in order.

    Args:
        cases: keys of ``CASES``.
        models: those named by the user; None: those of each case that are among the effort's.
        effort: how much of it.
    """
    for name in cases:
        case = CASES[name]
        chosen = models or [model for model in case.models if model in effort.models or model in case.always]
        yield from case.tasks(chosen or effort.models[:1], effort)


def run(
    cases: Sequence[str],
    models: Sequence[str] | None,
    peers: Sequence[str],
    effort: Effort,
    device: str = "cpu",
    report: Report = lambda record: None,
) -> Results:
    """Everything that was asked for.

    Args:
        cases: keys of ``CASES``.
        models: keys of ``MODELS``; None: those of each case.
        peers: names of files in ``benchmarks/peers``.
        effort: rounds and limits.
        device: "cpu" or "cuda".
        report: called after each task.

    Returns:
        What was measured; up to an interruption, if there was one.
    """
    begin = time.monotonic()
    with quiet(), fair_attention():
        present, missing = available(peers)
        session = Session(present, effort, device)
        limits = {**dataclasses.asdict(effort), "models": models or effort.models, "cases": cases}
        limits["minutes"] = None if effort.minutes == float("inf") else effort.minutes  # JSON has no infinity
        settings: dict[str, Any] = json.loads(json.dumps(limits))
        results = Results(describe(present, device), settings, missing)
        for task in tasks(cases, models, effort):
            if time.monotonic() - begin > 60 * effort.minutes:
                record = Record(task, skipped={"all": f"not begun within {effort.minutes:g} minutes"})
            else:
                try:
                    record = CASES[task.case].measure(task, session)
                except KeyboardInterrupt:  # what is known so far is worth having
                    break
                except Exception as error:  # out of memory in a later round, say: one task is lost, not the run
                    record = Record(task, skipped={"all": f"{type(error).__name__}: {error}"})
            results.records.append(record)
            report(record)
    return results

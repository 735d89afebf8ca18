"""The vocabulary of cases: what there is to do, and how one task is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from benchmarks.checking import compare
from benchmarks.effort import Effort
from benchmarks.models import DEFAULT
from benchmarks.peers.base import Run
from benchmarks.peers.curvalg import Curvalg
from benchmarks.peers.torch_by_hand import TorchByHand
from benchmarks.questions import QUESTIONS
from benchmarks.results import Record, Task
from benchmarks.timing import Entrant, race, stopwatch
from benchmarks.workload import Workload, build

if TYPE_CHECKING:  # a session knows all cases
    from benchmarks.session import Session


class Case(ABC):
    """A group of tasks.

    Attributes:
        name: as ``--cases`` takes it.
        says: one line about it.
        models: that it runs on unless others are named.
        always: those of them that a short run has too.
    """

    name: ClassVar[str]
    says: ClassVar[str]
    models: ClassVar[tuple[str, ...]] = DEFAULT
    always: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def tasks(self, models: Sequence[str], effort: Effort) -> Iterator[Task]:
        """What there is to do."""

    @abstractmethod
    def measure(self, task: Task, session: Session) -> Record:
        """Do one task."""


class TimedCase(Case):
    """Contestants are prepared, their answers compared, and then they race, one gradient among them."""

    tolerance: ClassVar[float | None] = None

    @abstractmethod
    def entrants(self, task: Task, workload: Workload, session: Session, record: Record) -> dict[str, Entrant]:
        """Who takes part, by label, the one that the others are compared with first."""

    def measure(self, task: Task, session: Session) -> Record:
        record = Record(task)
        workload = build(task.model, session.effort.sizes, session.device, task.columns, task.batches)
        with workload.closing, torch.random.fork_rng():
            torch.manual_seed(0)  # some libraries draw from the global generator
            entrants = self.entrants(task, workload, session, record)
            values, first = _first_runs(entrants, session.device, record)
            entrants = {label: entrants[label] for label in values}
            differences = {label: entrant.difference for label, entrant in entrants.items()}
            question = QUESTIONS[task.question]
            tolerance = question.tolerance if self.tolerance is None else self.tolerance
            judge = TorchByHand().prepare(task.question, workload)
            record.checks = compare(values, tolerance, differences, judge, random=question.random)
            del values
            if entrants:
                by_hand = TorchByHand().prepare("gradient", workload)
                assert by_hand is not None
                gradient = {"gradient": Entrant(by_hand)}
                first |= {"gradient": stopwatch(session.device)(by_hand)[0]}
                record.values = race(gradient | entrants, first, session.effort, session.device)
        return record


class PeersCase(TimedCase):
    """All libraries that answer the question."""

    def entrants(self, task: Task, workload: Workload, session: Session, record: Record) -> dict[str, Entrant]:
        found = {}
        for peer in session.peers:
            if peer.only and task.case not in peer.only:
                continue
            session.warm_up(peer, task.question)
            run = _attempt(partial(peer.prepare, task.question, workload), peer.name, record)
            if run is not None:
                difference = peer.difference(task.question, task.model)
                found[peer.name] = Entrant(run, peer.settled(task.columns), difference)
        return found


class WaysCase(TimedCase):
    """Ways of one library to the same matrix."""

    @abstractmethod
    def ways(self, task: Task) -> Mapping[str, Callable[[Workload], Run]]:
        """By label; one that raises is left out and says why."""

    def entrants(self, task: Task, workload: Workload, session: Session, record: Record) -> dict[str, Entrant]:
        found = {}
        for label, way in self.ways(task).items():
            run = _attempt(partial(way, workload), label, record)
            if run is not None:
                found[label] = Entrant(run, Curvalg().settled(task.columns))
        return found


def _attempt(prepare: Callable[[], Run | None], label: str, record: Record) -> Run | None:
    try:
        return prepare()
    except Exception as error:  # whatever a library raises costs its own row, not the run
        record.skipped[label] = f"{type(error).__name__}: {error}"
        return None


def _first_runs(
    entrants: Mapping[str, Entrant], device: str, record: Record
) -> tuple[dict[str, Tensor], dict[str, float]]:
    watch = stopwatch(device)
    values: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    for label, entrant in entrants.items():
        try:
            seconds[label], values[label] = watch(entrant.run)
        except Exception as error:
            record.skipped[label] = f"{type(error).__name__}: {error}"
    return values, seconds

"""What a run leaves behind, in memory and as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.checking import Check

SCHEMA = 1


@dataclass(frozen=True)
class Task:
    """One question on one model.

    Args:
        case: a key of ``CASES``.
        question: what is asked.
        model: a key of ``MODELS``.
        columns: K.
        batches: that the data are split into.
    """

    case: str
    question: str
    model: str
    columns: int = 1
    batches: int = 1

    def __str__(self) -> str:
        return f"{self.case}: {self.question}, {self.model}, K = {self.columns}, batches = {self.batches}"


@dataclass
class Record:
    """What a task gave.

    Args:
        task: what was asked.
        unit: "s" or "byte".
        values: of all rounds, by contestant.
        checks: of the answers, by contestant.
        skipped: why a contestant has no values.
    """

    task: Task
    unit: str = "s"
    values: dict[str, list[float]] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def median(self, contestant: str) -> float | None:
        """Of all rounds, None without any."""
        values = self.values.get(contestant)
        return statistics.median(values) if values else None

    def ratio(self, contestant: str, base: str = "gradient") -> float | None:
        """Of two medians; None where there is none."""
        above, below = self.median(contestant), self.median(base)
        return above / below if above is not None and below else None


@dataclass
class Results:
    """A run.

    Args:
        environment: what it ran on and with.
        settings: how it was asked for.
        missing: contestants that could not take part, and why.
        records: what was measured.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    missing: dict[str, str] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    def of(self, case: str) -> list[Record]:
        """The records of a case."""
        return [record for record in self.records if record.task.case == case]

    def find(self, *cases: str, **wanted: Any) -> Record | None:
        """The record of these cases with these attributes of its task."""
        for record in self.records:
            if record.task.case in cases and all(getattr(record.task, k) == v for k, v in wanted.items()):
                return record
        return None

    def notes(self) -> Iterator[tuple[Task, str, Check]]:
        """Every answer that does not agree: what was asked, whose it is, and how."""
        for record in self.records:
            for label, check in record.checks.items():
                if check.verdict != "agrees":
                    yield record.task, label, check

    def failures(self) -> list[str]:
        """curvalg failing or being wrong, or nobody knowing who is; a peer that is wrong or differs is a finding."""
        peers = {name for name, distribution in self.environment["contestants"].items() if distribution != "curvalg"}
        wrong = [
            f"{task}: {check.note}"
            for task, label, check in self.notes()
            if check.verdict == "disagrees" or (check.verdict == "wrong" and label not in peers)
        ]
        failed = [f"{r.task}: {r.skipped['curvalg']}" for r in self.records if "curvalg" in r.skipped]
        return wrong + failed

    def save(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Results:
        """What :meth:`save` wrote.

        Raises:
            ValueError: the file has another schema.
        """
        read = json.loads(path.read_text(encoding="utf-8"))
        if read.pop("schema", None) != SCHEMA:
            raise ValueError(f"{path} is not of schema {SCHEMA}: measure again with `python -m benchmarks`")
        read["records"] = [_record(record) for record in read["records"]]
        return cls(**read)


def _record(read: dict[str, Any]) -> Record:
    checks = {label: Check(**check) for label, check in read.pop("checks").items()}
    return Record(task=Task(**read.pop("task")), checks=checks, **read)

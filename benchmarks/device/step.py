"""The vocabulary of parts: a part is made of steps, and a step is a row of its table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.device.place import Place

Cell = str | float | int | None


@dataclass
class Outcome:
    """What a step gave.

    Args:
        cells: of the table's row, by column.
        failures: what is wrong, a line each.
        notes: what else there is to say, as who was left out and why.
        skipped: why the step could not be made here; "" where it was made.
        seconds: that it took.
    """

    cells: dict[str, Cell] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str = ""
    seconds: float = 0.0

    def need(self, holds: bool, complaint: str) -> None:
        """Note a failure unless something holds."""
        if not holds:
            self.failures.append(complaint)


@dataclass(frozen=True)
class Step:
    """One row of a part's table.

    Args:
        name: unique in the part; what is in the file under it is not measured again.
        run: what gives it.
        expected: seconds that are to be left for it.
    """

    name: str
    run: Callable[[], Outcome]
    expected: float = 0.0


class Part(Protocol):
    """A part: a module of ``benchmarks.device.parts``; its docstring's first line says what it is about."""

    def steps(self, place: Place) -> Iterator[Step]:
        """What there is to do, the most important first."""

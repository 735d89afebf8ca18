"""The file of a run: what is in it is not measured again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.device.step import Outcome

SCHEMA = 1
KIND = "device"


@dataclass
class PartRecord:
    """What is known of a part.

    Args:
        made_with: versions and device.
        steps: outcomes, by name.
        complete: whether no step is missing.
    """

    made_with: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, Outcome] = field(default_factory=dict)
    complete: bool = False

    @property
    def failures(self) -> list[str]:
        """Of all steps."""
        return [f"{name}: {line}" for name, outcome in self.steps.items() for line in outcome.failures]


@dataclass
class DeviceResults:
    """A run.

    Args:
        environment: what it ran on and with, at the last call.
        parts: by name.
    """

    environment: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, PartRecord] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """As JSON; whole or not at all, since a run may be killed at any time."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".part")
        written = {"schema": SCHEMA, "kind": KIND, **asdict(self)}
        fresh.write_text(json.dumps(written, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        fresh.replace(path)

    @classmethod
    def load(cls, path: Path) -> DeviceResults:
        """What :meth:`save` wrote.

        Raises:
            ValueError: the file is another one.
        """
        read = json.loads(path.read_text(encoding="utf-8"))
        if (read.pop("schema", None), read.pop("kind", None)) != (SCHEMA, KIND):
            raise ValueError(f"{path} is not a file of `python -m benchmarks.device`: give another name by --json")
        for part in read["parts"].values():
            part["steps"] = {name: Outcome(**outcome) for name, outcome in part["steps"].items()}
        return cls(read["environment"], {name: PartRecord(**part) for name, part in read["parts"].items()})

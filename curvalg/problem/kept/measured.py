"""Choices by short measurements between ways that give the same numbers up to rounding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from curvalg.problem.kept.expected import Expected
from curvalg.problem.kept.remembered import Remembered


class Measured:
    """Choices by name: those of this run, and those of an earlier one, which are not measured again.

    A resumed run that takes the ways of the interrupted one gives the same bits.

    Args:
        names: of the parameters that the choices are about.
        device: where they were measured, for clocks to wait for.
        like: choices to share, about other parameters of the same problem.
    """

    def __init__(self, names: Iterable[str], device: torch.device, like: Measured | None = None) -> None:
        self._names, self.device = list(names), device
        self.choices: dict[str, Any] = {} if like is None else like.choices
        self.recalled: dict[str, Any] = {} if like is None else like.recalled
        self.remembered: Remembered = Remembered() if like is None else like.remembered
        self.expected: Expected = Expected() if like is None else like.expected

    def name(self, topic: str, subject: object) -> str:
        """The name of a choice about something on these parameters."""
        digest = hashlib.sha256("\n".join(self._names).encode()).hexdigest()[:12]
        return f"{topic} of {subject} over {len(self._names)} tensors ({digest})"

    def known(self, name: str) -> Any:
        """The choice of an earlier run, of an earlier state of the model or of another problem; None if there was none."""
        known = self.recalled.get(name, self.choices.get(name))
        return self.remembered.get(name) if known is None else known

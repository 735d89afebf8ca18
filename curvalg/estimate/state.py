"""What a resumable algorithm is: a small object and a state that it maps to the next one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

Number: TypeAlias = int | float | str | list[int] | list[float] | list[str] | None
Options: TypeAlias = dict[str, Number]


@dataclass(frozen=True)
class State:
    """Everything that decides how an algorithm goes on.

    Args:
        tensors: by name; no step writes into them.
        numbers: by name, what JSON can hold: counters, seeds, and measured choices, which are kept for the rest of the run.
            ``products`` counts products with one vector.
    """

    tensors: dict[str, Tensor]
    numbers: Options

    @property
    def products(self) -> int:
        """Products with one vector so far."""
        count = self.numbers["products"]
        assert isinstance(count, int)
        return count


class Named(Protocol):
    """What a checkpoint tells of a run."""

    @property
    def name(self) -> str:
        """For messages and checkpoints."""
        ...

    @property
    def options(self) -> Options:
        """All that decides the result, except the operator."""
        ...


class Algorithm(Named, Protocol):
    """A resumable algorithm.

    ``step`` is a function of the state alone: random numbers come from CPU generators that are seeded by numbers in the
    state, and choices that were measured are looked up there. So a run that was killed and resumed gives the same bits.
    """

    def start(self) -> State:
        """The state before the first step."""
        ...

    def step(self, state: State) -> State:
        """The next state."""
        ...

    def done(self, state: State) -> bool:
        """Whether there is nothing more to do."""
        ...

    def expected(self, state: State) -> int:
        """Products that all of it will take, by a guess that may change."""
        ...

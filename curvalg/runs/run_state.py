"""The contract of a resumable algorithm: a small object and a state that it maps to the next one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = int | float | str | list[int] | list[float] | list[str] | list[list[float]] | None
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
        """The number of products with one vector so far."""
        return self.count("products")

    def count(self, name: str) -> int:
        """The number of this name, which is an integer."""
        number = self.numbers[name]
        assert isinstance(number, int)
        return number


Form = Mapping[str, tuple[torch.dtype, tuple[int | str, ...]]]
"""Tensors of a state: name -> dtype and sizes, which are numbers, or letters for sizes that may be any."""


def is_count(value: object) -> bool:
    """Whether something is an integer ≥ 0."""
    return type(value) is int and value >= 0


def sizes(state: State, numbers: Mapping[str, Callable[[object], bool]], tensors: Form) -> dict[str, int] | None:
    """The sizes that the letters of a form stand for; None for a state that has another form.

    Args:
        state: as it was read from a file.
        numbers: names -> whether a value is one.
        tensors: all of them; the same letter stands for the same size everywhere.

    >>> state = State({"basis": torch.zeros(2, 5)}, {"products": 3})
    >>> sizes(state, {"products": is_count}, {"basis": (torch.float32, ("k", 5))})
    {'k': 2}
    """
    if state.numbers.keys() != numbers.keys() or state.tensors.keys() != tensors.keys():
        return None
    if not all(good(state.numbers[name]) for name, good in numbers.items()):
        return None
    found: dict[str, int] = {}
    for name, (dtype, shape) in tensors.items():
        t = state.tensors[name]
        if t.dtype != dtype or t.ndim != len(shape):
            return None
        for size, wanted in zip(t.shape, shape, strict=True):
            if size != (found.setdefault(wanted, size) if isinstance(wanted, str) else wanted):
                return None
    return found


class Named(Protocol):
    """The description of a run in a checkpoint."""

    @property
    def name(self) -> str:
        """The name for messages and checkpoints."""
        ...

    @property
    def options(self) -> Options:
        """Everything that decides the result, except the operator."""
        ...

    def axes(self, state: State) -> Mapping[str, int]:
        """Names of tensors that are vectors -> the axis along which their numbers lie, of which a process may have a part."""
        ...

    def fits(self, state: State) -> bool:
        """Whether a state read from a file can be one of this algorithm."""
        ...


class Algorithm(Named, Protocol):
    """A resumable algorithm, as a map from each state to the next.

    ``step`` is a function of the state alone: random numbers come from CPU generators that are seeded by numbers in the
    state, and choices that were measured are looked up there. So a run that was killed and resumed gives the same bits.
    """

    def start(self) -> State:
        """The state before the first step."""
        ...

    def step(self, state: State) -> State:
        """The state after this one."""
        ...

    def done(self, state: State) -> bool:
        """Whether there is nothing more to do."""
        ...

    def expected(self, state: State) -> int:
        """The products that the whole run will take, by a guess that may change."""
        ...

"""What estimators by random products have in common: columns are added until the budget or the tolerance is reached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from curvalg.estimate.probes import Probes
from curvalg.estimate.state import Options, State
from curvalg.estimate.target import Target
from curvalg.solve.orthogonal import small

AT_ONCE, WIDEST = 2**24, 256
"""Numbers, and vectors, in one block of products."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Sketch(ABC):
    """A resumable estimator.

    The products of random vectors, the sketch, are added a block at a time. When the budget is spent the estimate is made; if
    its error is more than the tolerance allows, the budget is doubled and all that was computed is kept. Where the next budget
    would be more than ``most``, the exact value by n unit vectors is the last resort, if that is not too much either.

    Args:
        target: the operator.
        products: of the first budget, or of the only one.
        tol: relative to the value, or None for one budget.
        seed: of the random vectors.
        most: products that all budgets, and the last resort, may take.
        price: products that one multiplication counts as.
    """

    target: Target
    products: int
    tol: float | None
    seed: int
    most: int
    price: int = 1

    method: ClassVar[str]
    multiplications: ClassVar[int] = 1
    """How many each test vector takes."""
    fewest: ClassVar[int] = 2
    """The least number of test vectors."""
    safety: ClassVar[float] = 1.0
    """By which the standard error of the samples is multiplied, for samples that depend on each other look too much alike.
    Calibrated over five spectra: at least nine of ten errors are below two of the reported ones."""
    distribution: ClassVar[Literal["sphere", "signs"]] = "sphere"
    keeps: ClassVar[bool] = True
    """Whether test vectors are needed again."""

    @abstractmethod
    def empty(self) -> Tensors:
        """The sketch of no vectors."""

    @abstractmethod
    def extended(self, sketch: Tensors, start: int, stop: int) -> tuple[Tensors, int]:
        """The sketch with test vectors start ≤ i < stop, and how many multiplications that took."""

    @abstractmethod
    def estimate(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """Value and standard error, float64."""

    def exact(self, start: int, stop: int) -> Tensor:
        """What unit vectors start ≤ i < stop contribute, float64, one number each."""
        space = self.target.space
        units = torch.zeros(self.target.size, stop - start, dtype=space.dtype, device=space.device)
        units[torch.arange(start, stop), torch.arange(stop - start)] = 1
        return small(self.target.multiply(units)[start:stop].diagonal())

    def total(self, contributions: Tensor) -> Tensor:
        """The value by the contributions of all unit vectors."""
        return contributions.sum()

    # -- the algorithm --------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """For messages and checkpoints."""
        return self.method

    @property
    def options(self) -> Options:
        """All that decides the result, except the operator."""
        return {"products": self.products, "tol": self.tol, "seed": self.seed, "maxiter": self.most}

    @cached_property
    def probes(self) -> Probes:
        """The test vectors."""
        return Probes(self.target.space, self.seed, self.distribution, self.keeps)

    def start(self) -> State:
        """Nothing multiplied yet."""
        nothing = torch.zeros(0, dtype=torch.float64)
        last = int(self._columns(self.products) == 0)
        return State(
            {"value": nothing, "error": nothing, "units": nothing, **self.empty()},
            {"products": 0, "columns": 0, "budget": self.products, "last resort": last, "done": 0},
        )

    def step(self, state: State) -> State:
        """One block of test vectors, or of unit vectors."""
        return self._unit_step(state) if state.numbers["last resort"] else self._random_step(state)

    def done(self, state: State) -> bool:
        """Whether budget or tolerance is reached."""
        return bool(state.numbers["done"])

    def expected(self, state: State) -> int:
        """The budget as it stands."""
        return self.target.size * self.price if state.numbers["last resort"] else _integer(state, "budget")

    def reached(self, state: State) -> bool:
        """Whether the error is as small as was asked for."""
        if self.tol is None:
            return self.done(state)
        value, error = state.tensors["value"], state.tensors["error"]
        return bool(len(error.reshape(-1))) and bool(error.norm() <= self.tol * value.norm())

    def result(self, state: State) -> tuple[Tensor, Tensor]:
        """Value and standard error; of an interrupted run those of the test vectors so far."""
        columns = _integer(state, "columns")
        if self.done(state) or not columns:
            return state.tensors["value"], state.tensors["error"]
        return self._estimate(state.tensors, columns)

    def _random_step(self, state: State) -> State:
        columns, budget = _integer(state, "columns"), _integer(state, "budget")
        wanted = self._columns(budget)
        stop = min(wanted, columns + self._width)
        sketch, multiplications = self.extended(state.tensors, columns, stop)
        tensors = {**state.tensors, **sketch}
        numbers = {**state.numbers, "columns": stop, "products": state.products + self.price * multiplications}
        if stop < wanted:
            return State(tensors, numbers)
        tensors["value"], tensors["error"] = self._estimate(tensors, stop)
        state = State(tensors, numbers)
        if self.tol is None or self.reached(state):
            return State(tensors, {**numbers, "done": 1})
        if 2 * budget <= self.most and self._columns(2 * budget) > stop:
            return State(tensors, {**numbers, "budget": 2 * budget})
        if state.products + self.price * self.target.size <= self.most:
            return State(tensors, {**numbers, "last resort": 1})
        return State(tensors, {**numbers, "done": 1})

    def _unit_step(self, state: State) -> State:
        start, n = len(state.tensors["units"]), self.target.size
        stop = min(n, start + self._width)
        units = torch.cat([state.tensors["units"], self.exact(start, stop)])
        tensors = {**state.tensors, "units": units}
        numbers: Options = {**state.numbers, "products": state.products + self.price * (stop - start)}
        if stop == n:
            value = self.total(units)
            tensors, numbers = {**tensors, "value": value, "error": torch.zeros_like(value)}, {**numbers, "done": 1}
        return State(tensors, numbers)

    def _estimate(self, tensors: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        value, error = self.estimate(tensors, columns)
        return value.double(), self.safety * error.double()

    def _columns(self, budget: int) -> int:
        return min(budget // (self.price * self.multiplications), self.target.size)

    @property
    def _width(self) -> int:
        # A function of the size alone, so that resumed runs multiply the same blocks.
        return max(1, min(WIDEST, AT_ONCE // max(1, self.target.size)))

    def _no_rows(self) -> Tensor:
        space = self.target.space
        return torch.zeros(0, self.target.size, dtype=space.dtype, device=space.device)

    def _multiply(self, rows: Tensor) -> Tensor:
        return self.target.multiply(rows.T).T.contiguous()


def standard_error(samples: Tensor) -> Tensor:
    """Of the mean of samples along the first axis; infinite for a single one."""
    return samples.std(0) / len(samples) ** 0.5 if len(samples) > 1 else torch.full_like(samples[0], torch.inf)


def _integer(state: State, name: str) -> int:
    number = state.numbers[name]
    assert isinstance(number, int)
    return number

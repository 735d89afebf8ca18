"""What estimators by random products have in common: columns are added until the budget or the tolerance is reached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from curvalg.estimate.sampling.probes import Probes, inner, pairwise
from curvalg.estimate.target import Target
from curvalg.runs.run_state import Form, Options, State, is_count, sizes

AT_ONCE, WIDEST = 2**24, 256
"""Numbers, and vectors, in one block of products."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Sketch(ABC):
    """A resumable estimator.

    The products of random vectors, the sketch, are added a block at a time. When the budget is spent the estimate is made; if
    its error is more than the tolerance allows, the budget is doubled and all that was computed is kept. Where the next budget
    would be more than ``most`` or more than n products, the last resort is the exact value: the vectors whose products are
    known are completed to an orthonormal basis, if that does not take too many either.

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
    safety: ClassVar[float] = 1.0
    """By which the standard error of the samples is multiplied, for samples that depend on each other look too much alike.
    Calibrated over five spectra: at least nine of ten errors are below two of the reported ones."""
    distribution: ClassVar[Literal["sphere", "signs"]] = "sphere"
    keeps: ClassVar[bool] = True
    """Whether test vectors are needed again."""
    large: ClassVar[tuple[str, ...]] = ()
    """Names of tensors that live on the operator's device."""

    @abstractmethod
    def form(self, columns: int) -> Form:
        """The sketch of so many test vectors: its tensors, with letters for what their number does not decide."""

    def empty(self) -> Tensors:
        """The sketch of no vectors."""
        return {
            name: torch.zeros(
                *(0 if isinstance(size, str) else size for size in shape),
                dtype=dtype,
                device=self.target.space.device if name in self.large else None,
            )
            for name, (dtype, shape) in self.form(0).items()
        }

    @abstractmethod
    def extended(self, sketch: Tensors, start: int, stop: int) -> tuple[Tensors, int]:
        """The sketch with test vectors start ≤ i < stop, and how many multiplications that took."""

    @abstractmethod
    def estimate(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """Value and standard error, float64."""

    def known(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """Orthonormal rows whose products the sketch knows, with these; none by default."""
        return self._no_rows(), self._no_rows()

    def images(self, rows: Tensor) -> Tensor:
        """Products with rows of a basis."""
        return self._multiply(rows)

    def contribution(self, rows: Tensor, images: Tensor) -> Tensor:
        """What orthonormal rows add to the value, float64; those of a whole basis make it exact."""
        return pairwise(rows, images).sum()

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
            {"value": nothing, "error": nothing, "total": nothing, **self.empty()},
            {"products": 0, "columns": 0, "budget": self.products, "last resort": last, "completed": 0, "done": 0},
        )

    def fits(self, state: State) -> bool:
        """Whether there is the sketch of as many test vectors as are counted, and a value where one was made."""
        flags = dict.fromkeys(("done", "last resort"), lambda value: is_count(value) and value in (0, 1))
        counts = dict.fromkeys(("products", "columns", "budget", "completed"), is_count)
        numbers = {**flags, **counts}
        if not all(name in state.numbers and good(state.numbers[name]) for name, good in numbers.items()):
            return False
        columns, wanted = _integer(state, "columns"), self._columns(_integer(state, "budget"))
        going = not state.numbers["done"] and not state.numbers["last resort"]
        shapes = {"nothing": (0,), "value": tuple(self.contribution(self._no_rows(), self._no_rows()).shape)}
        found = {
            name: tuple(t.shape) for name in ("value", "error", "total") if (t := state.tensors.get(name)) is not None
        }
        return (
            sizes(state, numbers, {**self.form(columns), **{name: (torch.float64, found[name]) for name in found}})
            is not None
            and (columns < wanted if going else columns == wanted)
            and len(found) == 3
            and found["value"] == found["error"]
            and set(found.values()) <= set(shapes.values())
            and (found["value"] == shapes["value"] or not self.done(state))
        )

    def step(self, state: State) -> State:
        """One block of test vectors, or of those that complete a basis."""
        state = self._placed(state)
        return self._completing_step(state) if state.numbers["last resort"] else self._random_step(state)

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

    def exact(self, state: State) -> bool:
        """Whether the value was completed to the exact one."""
        return bool(state.numbers["last resort"]) and self.done(state)

    def result(self, state: State) -> tuple[Tensor, Tensor]:
        """Value and standard error; of an interrupted run those of the test vectors so far."""
        columns = _integer(state, "columns")
        if self.done(state) or not columns:
            return state.tensors["value"], state.tensors["error"]
        return self._estimate(self._placed(state).tensors, columns)

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
        if 2 * budget <= min(self.most, self.price * self.target.size):
            return State(tensors, {**numbers, "budget": 2 * budget})
        if state.products + self.price * (self.target.size - len(self.known(tensors, stop)[0])) <= self.most:
            return State(tensors, {**numbers, "last resort": 1})
        return State(tensors, {**numbers, "done": 1})

    def _completing_step(self, state: State) -> State:
        rows, images = self.known(state.tensors, _integer(state, "columns"))
        start, missing = _integer(state, "completed"), self.target.size - len(rows)
        stop = min(missing, start + self._width)
        total = state.tensors["total"] if start else self.contribution(rows, images)
        new = complement(rows, start, stop)
        if len(new):
            total = total + self.contribution(new, self.images(new))
        tensors = {**state.tensors, "total": total}
        products = state.products + self.price * (stop - start)
        numbers: Options = {**state.numbers, "completed": stop, "products": products}
        if stop == missing:
            value = total.clone()  # checkpoints refuse tensors that share memory
            tensors, numbers = {**tensors, "value": value, "error": torch.zeros_like(total)}, {**numbers, "done": 1}
        return State(tensors, numbers)

    def _estimate(self, tensors: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        value, error = self.estimate(tensors, columns)
        return value.double(), self.safety * error.double()

    def _columns(self, budget: int) -> int:
        return min(budget // (self.price * self.multiplications), self.target.size)

    def _placed(self, state: State) -> State:
        """With the vectors on the operator's device, where a checkpoint was read."""
        device = self.target.space.device
        return State({**state.tensors, **{k: state.tensors[k].to(device) for k in self.large}}, state.numbers)

    @property
    def _width(self) -> int:
        # A function of the size alone, so that resumed runs multiply the same blocks.
        return max(1, min(WIDEST, AT_ONCE // max(1, self.target.size)))

    def _no_rows(self) -> Tensor:
        space = self.target.space
        return torch.zeros(0, self.target.size, dtype=space.dtype, device=space.device)

    def _multiply(self, rows: Tensor) -> Tensor:
        return self.target.multiply(rows.T).T.contiguous()


def complement(rows: Tensor, start: int, stop: int) -> Tensor:
    """Some of the n − k rows that complete orthonormal rows (k, n) to a basis: unit vectors where there are none."""
    k, n = rows.shape
    units = torch.zeros(n, stop - start, dtype=rows.dtype, device=rows.device)
    units[torch.arange(k + start, k + stop), torch.arange(stop - start)] = 1
    if k and stop > start:
        units = torch.ormqr(*torch.geqrf(rows.T), units)
    return units.T.contiguous()


def independent(rows: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal combinations of rows, with those of their images; of nearly dependent directions none."""
    values, vectors = torch.linalg.eigh(inner(rows, rows))
    clear = values > torch.finfo(rows.dtype).eps ** 0.5 * rows.shape[1]
    weights = (vectors[:, clear] / values[clear].sqrt()).T.to(rows)
    return weights @ rows, weights @ images


class UnitVectors(Sketch):
    """The exact value, by an orthonormal basis alone."""

    method: ClassVar[str] = "exact"

    def form(self, columns: int) -> Form:
        """Nothing."""
        return {}

    def extended(self, sketch: Tensors, start: int, stop: int) -> tuple[Tensors, int]:
        """Never asked for."""
        raise NotImplementedError

    def estimate(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """Never asked for."""
        raise NotImplementedError

    def _columns(self, budget: int) -> int:
        return 0


def standard_error(samples: Tensor) -> Tensor:
    """Of the mean of samples along the first axis; infinite for a single one."""
    return samples.std(0) / len(samples) ** 0.5 if len(samples) > 1 else torch.full_like(samples[0], torch.inf)


def _integer(state: State, name: str) -> int:
    number = state.numbers[name]
    assert isinstance(number, int)
    return number

"""The sampler that traces, diagonals and norms share: random vectors are added until the budget or the tolerance is reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from curvalg.estimate.sampling.estimator import Estimator, Tensors
from curvalg.estimate.target import Target
from curvalg.runs.run_state import Options, State, is_count, sizes
from curvalg.tensors.memory import wide
from curvalg.tensors.spaces import VectorSpace

AT_ONCE, WIDEST = 2**24, 256
"""Numbers, and vectors, in one block of products."""


@dataclass(frozen=True)
class Sampler:
    """A resumable algorithm that an estimator gets its test vectors from, numbered from zero.

    The products of random vectors, the sketch, are added a block at a time. When the budget is spent the estimate is made; if
    its error is more than the tolerance allows, the budget is doubled and all that was computed is kept. Where the next budget
    would be more than ``most`` or more than n products, the last resort is the exact value: the vectors whose products are
    known are completed to an orthonormal basis, if that does not take too many either.

    Args:
        estimator: what is made of the vectors.
        products: of the first budget, or of the only one.
        tol: relative to the value, or None for one budget.
        most: products that all budgets, and the last resort, may take.
        price: products that one multiplication counts as.
    """

    estimator: Estimator
    products: int
    tol: float | None
    most: int
    price: int = 1

    @property
    def target(self) -> Target:
        """The operator that is multiplied."""
        return self.estimator.target

    @property
    def name(self) -> str:
        """The name for messages and checkpoints."""
        return self.estimator.method

    @property
    def options(self) -> Options:
        """Everything that decides the result, except the operator."""
        return {"products": self.products, "tol": self.tol, "seed": self.estimator.seed, "maxiter": self.most}

    def axes(self, state: State) -> Mapping[str, int]:
        """The axes of vectors in the sketch, and of values that are vectors."""
        values = dict.fromkeys(("value", "error", "total"), 0) if self.estimator.integrand.entrywise else {}
        return {**self.estimator.axes, **values}

    def start(self) -> State:
        """The state with nothing multiplied yet."""
        nothing = torch.zeros(0, dtype=torch.float64, device="cpu")
        last = int(self._columns(self.products) == 0)
        return State(
            {"value": nothing, "error": nothing, "total": nothing, **self._empty()},
            {"products": 0, "columns": 0, "budget": self.products, "last resort": last, "completed": 0, "done": 0},
        )

    def _empty(self) -> Tensors:
        """The sketch of no vectors."""
        return {
            name: torch.zeros(
                *(0 if isinstance(size, str) else size for size in shape),
                dtype=dtype,
                device=self.target.space.device if name in self.estimator.axes else "cpu",
            )
            for name, (dtype, shape) in self.estimator.form(0).items()
        }

    def fits(self, state: State) -> bool:
        """Whether there is the sketch of as many test vectors as are counted, and a value where one was made."""
        flags = dict.fromkeys(("done", "last resort"), lambda value: is_count(value) and value in (0, 1))
        counts = dict.fromkeys(("products", "columns", "budget", "completed"), is_count)
        numbers, none = {**flags, **counts}, self.estimator.no_rows()
        if not all(name in state.numbers and good(state.numbers[name]) for name, good in numbers.items()):
            return False
        columns, wanted = state.count("columns"), self._columns(state.count("budget"))
        going = not state.numbers["done"] and not state.numbers["last resort"]
        shapes = {"nothing": (0,), "value": tuple(self.estimator.integrand.total(self.target, none, none).shape)}
        found = {
            name: tuple(t.shape) for name in ("value", "error", "total") if (t := state.tensors.get(name)) is not None
        }
        form = {**self.estimator.form(columns), **{name: (torch.float64, shape) for name, shape in found.items()}}
        return (
            sizes(state, numbers, form) is not None
            and (columns < wanted if going else columns == wanted)
            and len(found) == 3
            and found["value"] == found["error"]
            and set(found.values()) <= set(shapes.values())
            and (found["value"] == shapes["value"] or not self.done(state))
        )

    def step(self, state: State) -> State:
        """Multiply one block of test vectors, or of those that complete a basis."""
        state = self._placed(state)
        return self._completing_step(state) if state.numbers["last resort"] else self._random_step(state)

    def done(self, state: State) -> bool:
        """Whether budget or tolerance is reached."""
        return bool(state.numbers["done"])

    def expected(self, state: State) -> int:
        """The number of products in the present budget."""
        return self.target.size * self.price if state.numbers["last resort"] else state.count("budget")

    def reached(self, state: State) -> bool:
        """Whether the error is as small as was asked for."""
        if self.tol is None:
            return self.done(state)
        value, error = state.tensors["value"], state.tensors["error"]
        size = self.estimator.integrand.size
        made = self.done(state) or 0 < self._columns(self.products) <= state.count("columns")
        return made and bool(size(self.target, error) <= self.tol * size(self.target, value))

    def begun(self, state: State) -> bool:
        """Whether there is anything to make a value of."""
        return self.done(state) or state.count("columns") > 0

    def exact(self, state: State) -> bool:
        """Whether the value was completed to the exact one."""
        return bool(state.numbers["last resort"]) and self.done(state)

    def result(self, state: State) -> tuple[Tensor, Tensor]:
        """The value and its standard error; of an interrupted run those of the test vectors so far."""
        if self.done(state) or not self.begun(state):
            return state.tensors["value"], state.tensors["error"]
        return self._estimate(self._placed(state).tensors, state.count("columns"))

    def _random_step(self, state: State) -> State:
        columns, budget = state.count("columns"), state.count("budget")
        wanted = self._columns(budget)
        stop = min(wanted, columns + self._width)
        sketch, multiplications = self.estimator.extended(state.tensors, columns, stop)
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
        if state.products + self.price * (self.target.size - len(self._known(tensors, stop)[0])) <= self.most:
            return State(tensors, {**numbers, "last resort": 1})
        return State(tensors, {**numbers, "done": 1})

    def _completing_step(self, state: State) -> State:
        rows, images = self._known(state.tensors, state.count("columns"))
        start, missing = state.count("completed"), self.target.size - len(rows)
        stop = min(missing, start + self._width)
        total = state.tensors["total"] if start else self.estimator.integrand.total(self.target, rows, images)
        new = complement(rows, start, stop, self.target.vectors)
        if len(new):
            total = total + self.estimator.integrand.total(self.target, new, self.estimator.images(new))
        tensors = {**state.tensors, "total": total}
        products = state.products + self.price * (stop - start)
        numbers: Options = {**state.numbers, "completed": stop, "products": products}
        if stop == missing:
            value = total.clone()  # checkpoints refuse tensors that share memory
            tensors, numbers = {**tensors, "value": value, "error": torch.zeros_like(total)}, {**numbers, "done": 1}
        return State(tensors, numbers)

    def _known(self, tensors: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """The rows that a basis begins with, and their products.

        None between processes: the reflections that complete a basis are of whole vectors. Unit vectors are a basis there.
        """
        if not self.target.vectors.whole:
            return self.estimator.no_rows(), self.estimator.no_rows()
        return self.estimator.known(tensors, columns)

    def _estimate(self, tensors: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        value, error = self.estimator.estimate(tensors, columns)
        return wide(value), self.estimator.safety * wide(error)

    def _columns(self, budget: int) -> int:
        return self.estimator.columns(budget // self.price, self.target.size)

    def _placed(self, state: State) -> State:
        """The state with its vectors on the operator's device, where a checkpoint was read."""
        device = self.target.space.device
        return State({**state.tensors, **{k: state.tensors[k].to(device) for k in self.estimator.axes}}, state.numbers)

    @property
    def _width(self) -> int:
        # A function of the size alone, so that resumed runs multiply the same blocks.
        return max(1, min(WIDEST, AT_ONCE // max(1, self.target.size)))


def complement(rows: Tensor, start: int, stop: int, space: VectorSpace) -> Tensor:
    """Some of the n − k rows that complete orthonormal rows (k, n) to a basis: unit vectors where there are none."""
    k = len(rows)
    units = space.units(k + start, k + stop, rows)
    if not k or stop == start:
        return units
    return torch.ormqr(*torch.geqrf(rows.T), units.T).T.contiguous()

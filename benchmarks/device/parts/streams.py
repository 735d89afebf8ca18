"""Races: copies and products behind long kernels and on other streams give what they give after a wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.device.place import Place
from benchmarks.device.step import Outcome, Step
from benchmarks.device.workloads import Given, draw, given, scaled_error
from benchmarks.peers.curvalg import matrix
from benchmarks.workload import Batches
from curvalg import Identity, Problem, inverse, registry
from curvalg.estimate import eigsh

BOUND = 1e-9
MODELS = {True: "MLP", False: "tiny"}
"""On a GPU, and elsewhere; in float64."""

Race = Callable[[Place, Given, Given], Tensor]
"""The answer of a race; what it is given is on the CPU, and on the device."""


def product(problem: Problem, times: int = 1) -> Tensor:
    """With the sum of three matrices, so many times."""
    op, v = matrix("sum").lower(problem), draw(problem.size).to(problem.device, problem.dtype)
    for _ in range(times):
        result: Tensor = op @ v
    return result


def pinned(place: Place, data: Batches) -> Batches:
    """Data whose copies to the device need not wait; as they are where nothing is pinned."""
    return [(X.pin_memory(), y.pin_memory()) for X, y in data] if place.real else data


def data_on_the_device(place: Place, host: Given, there: Given) -> Tensor:
    """A model on the CPU, and data on the device that are not made yet."""
    place.busy()
    data = [(X + 0.0, y + 0) for X, y in there.data]  # queued, too
    return product(Problem(host.model, host.loss, data))


def late_uploads(place: Place, host: Given, there: Given) -> Tensor:
    """Batches that the user uploads without waiting, behind a long kernel."""
    place.busy()
    data = [
        (X.to(place.device, non_blocking=True), y.to(place.device, non_blocking=True))
        for X, y in pinned(place, host.data)
    ]
    return product(Problem(there.model, there.loss, data), 3)


class Uploading:
    """A re-iterable of batches that are uploaded without waiting in every pass.

    Args:
        place: the device.
        data: pinned.
    """

    def __init__(self, place: Place, data: Batches) -> None:
        self.place, self.data = place, data

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for X, y in self.data:
            self.place.busy()
            yield X.to(self.place.device, non_blocking=True), y.to(self.place.device, non_blocking=True)


def uploads_in_every_pass(place: Place, host: Given, there: Given) -> Tensor:
    """The same from a loader, recorded anew in every product."""
    return product(Problem(there.model, there.loss, Uploading(place, pinned(place, host.data)), cache=0), 2)


class OneBuffer(Uploading):
    """The same from one pinned buffer that the next batch is written into."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        X, y = (torch.empty_like(t) for t in self.data[0])
        ((X, y),) = pinned(self.place, [(X, y)])
        for number, (next_X, next_y) in enumerate(self.data):
            if number:  # what the last upload still needs is a matter of whoever uploads
                self.place.wait()
            rows = len(next_X)
            X[:rows], y[:rows] = next_X, next_y
            self.place.busy()
            yield X[:rows], y[:rows]


def a_buffer_that_is_filled_again(place: Place, host: Given, there: Given) -> Tensor:
    """Batches on the CPU, in a pinned buffer of the loader; curvalg uploads them."""
    return product(Problem(there.model, there.loss, OneBuffer(place, host.data), cache=0), 2)


def a_pinned_loader(place: Place, host: Given, there: Given) -> Tensor:
    """A DataLoader with ``pin_memory=True`` and a long kernel in front of it."""
    X, y = (torch.cat(parts) for parts in zip(*host.data))
    loader = DataLoader(TensorDataset(X, y), batch_size=len(host.data[0][0]), pin_memory=place.real)
    problem = Problem(there.model, there.loss, loader)
    place.busy()
    return product(problem, 3)


def after_a_kernel_on_another_stream(place: Place, host: Given, there: Given) -> Tensor:
    """The vector comes from another stream, which the stream of the product waits for."""
    problem = there.problem()
    op = matrix("sum").lower(problem)
    v = draw(problem.size).to(place.device)
    op @ v
    with place.stream():
        place.busy()
        w = v * 1.0
    result: Tensor = op @ w
    return result


def on_another_stream(place: Place, host: Given, there: Given) -> Tensor:
    """Recorded on one stream and multiplied on another, behind a long kernel."""
    problem = there.problem()
    op, v = matrix("sum").lower(problem), draw(problem.size).to(place.device)
    place.busy()
    op @ v
    with place.stream():
        result: Tensor = op @ v
    return result


def recorded_on_another_stream(place: Place, host: Given, there: Given) -> Tensor:
    """The other way round."""
    problem = there.problem()
    op, v = matrix("sum").lower(problem), draw(problem.size).to(place.device)
    with place.stream():
        place.busy()
        op @ v
    place.busy()
    result: Tensor = op @ v
    return result


def read_at_once(place: Place, host: Given, there: Given) -> Tensor:
    """NumPy in and NumPy out, behind a long kernel."""
    problem = there.problem()
    op, v = matrix("sum").lower(problem), draw(problem.size).numpy()
    op @ v
    place.busy()
    return torch.from_numpy(np.asarray(op @ v))


def inverse_on_another_stream(place: Place, host: Given, there: Given) -> Tensor:
    """KFAC's inverse is built and multiplied on a stream of its own."""
    with place.stream():
        place.busy()
        return inverted(there.problem())


def inverted(problem: Problem) -> Tensor:
    """A product with the inverse of damped KFAC."""
    op = inverse(registry.build("kfac") + Identity).lower(problem)
    result: Tensor = op @ draw(problem.size).to(problem.device, problem.dtype)
    return result


def eigenvalues(problem: Problem) -> Tensor:
    """Two of the GGN's."""
    return eigsh(registry.build("ggn").lower(problem), 2, which="LA", tol=1e-10, block=1).eigenvalues


def eigenvalues_behind_a_kernel(place: Place, host: Given, there: Given) -> Tensor:
    """All small results are read while the device is late."""
    problem = there.problem()
    with place.stream():
        place.busy()
        return eigenvalues(problem)


RACES: dict[str, tuple[Race, Callable[[Problem], Tensor]]] = {
    "data on the device, model on the CPU": (data_on_the_device, product),
    "uploads that do not wait": (late_uploads, product),
    "uploads in every pass": (uploads_in_every_pass, product),
    "a pinned buffer that is filled again": (a_buffer_that_is_filled_again, product),
    "a pinned loader": (a_pinned_loader, product),
    "a vector from another stream": (after_a_kernel_on_another_stream, product),
    "a product on another stream": (on_another_stream, product),
    "recorded on another stream": (recorded_on_another_stream, product),
    "results read at once": (read_at_once, product),
    "an inverse on another stream": (inverse_on_another_stream, inverted),
    "eigenvalues on another stream": (eigenvalues_behind_a_kernel, eigenvalues),
}
"""The race, and what it must give; the latter is asked of the CPU."""


def steps(place: Place) -> Iterator[Step]:
    for name in RACES:
        yield Step(name, partial(_run, place, name))


def _run(place: Place, name: str) -> Outcome:
    race, reference = RACES[name]
    model = MODELS[place.real]
    host = given(model, batches=2)
    there = host.to(place)
    place.wait()
    if place.real:  # the result itself is read while the device is busy with something else
        torch.cuda.current_stream().synchronize()
    found = race(place, host, there).cpu()
    place.wait()
    error = scaled_error(found, reference(host.problem()))
    outcome = Outcome({"race": name, "model": model, "relative error": error})
    outcome.need(error <= BOUND, f"off by {error:.1e} from what a wait gives; {BOUND:g} is allowed")
    return outcome

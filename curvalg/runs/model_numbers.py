"""Numbers that identify what model, loss and data compute at a state, where names and parameters are the same.

Names of classes and values of parameters say nothing of an activation, an attribute, an adapter, or an option of a loss. Their
numbers do. For every row n of the data, with fixed waves w over the entries of an output z,

    zₙ,    Jₙᵀ cos(zₙ + φ),    the loss,    rₙ = ∂cₙ/∂zₙ    and    Bₙ w

are projected on waves, and the projections and their squares summed; so that neither the order of the rows nor the batches that
they come in change a sum by more than rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from curvalg.errors import CurvalgError
from curvalg.problem.batch import Batch
from curvalg.problem.data.row_hashes import Fingerprint
from curvalg.problem.passes.first_order import pulled
from curvalg.problem.problem import Problem
from curvalg.tensors.memory import wide, widest

Numbers: TypeAlias = dict[str, Fingerprint]
"""What it is of, in words -> sums, each with that of the magnitudes of its terms."""

OUTPUTS, DERIVATIVE, LOSS = "outputs of the model", "derivative of the model", "value and derivatives of the loss"


def numbers(problem: Problem) -> Numbers:
    """The numbers at the problem's state, by one pass over the data with one call of the model and one backward a batch.

    Raises:
        ProblemError: the model fails on the data, or its outputs are not finite.
    """
    sums = _Sums()
    with problem.lock, problem.differentiating():
        snapshot, total = problem.snapshot(), problem.sum()
        for evaluation in problem.evaluations(snapshot):
            weightless = evaluation.sample.weightless  # of a process that only joins in
            total.add(pulled(evaluation, lambda batch, joins=weightless: _take(sums, batch, joins)))  # type: ignore[misc]
        sums.merge(problem.group.objects(sums.parts()))
        _take_derivative(sums, problem, problem.totalled({"derivative": total})["derivative"])
    return sums.made()


def _take(sums: _Sums, batch: Batch, weightless: bool) -> Tensor:
    """Add what a batch shows of outputs and loss; returns a cotangent to pull back that the loss has no part in."""
    z, axis = batch.output, batch.class_axis
    if weightless:
        return torch.zeros_like(z)
    if axis is None:
        size, axes = z.shape[1:], tuple(range(1, z.ndim))
    else:  # by positions: outputs may be made in chunks of these
        size, axes = torch.Size([z.shape[axis]] + [1] * (z.ndim - 1 - axis % z.ndim)), (axis,)
    phases = torch.arange(1, 1 + size.numel(), device=z.device).to(z.dtype).view(size)
    waves = torch.cos(phases)
    sums.add(OUTPUTS, 0, z * waves, axes)
    if batch.has_loss:
        try:
            sums.add_total(LOSS, 0, batch.value().detach())
            sums.add(LOSS, 1, batch.loss_gradient.detach() * waves, axes)
            sums.add(LOSS, 2, batch.loss_hvp(waves.expand_as(z).contiguous()).detach() * waves, axes)
        except (
            CurvalgError,
            RuntimeError,
            NotImplementedError,
        ):  # the matrix may do without what the loss does not have
            sums.missing.add(LOSS)
    return torch.cos(z + phases)


def _take_derivative(sums: _Sums, problem: Problem, vector: Tensor) -> None:
    """Add what a vector over the parameters shows, of which each process may hold a part: each number counts once."""
    layout, space = problem.layout, problem.vectors
    found = torch.zeros(4, dtype=widest(vector.device), device=vector.device)
    for k, (name, shape) in enumerate(layout.whole.shapes.items(), 1):
        places, columns = layout.places_in(name).to(vector.device), max(1, math.prod(shape[1:]))
        down, across = (torch.cos(1.0 + at) for at in (places // columns, places % columns))
        terms = wide(k * down.to(vector) * across.to(vector) * vector[layout.slices[name]])
        every = torch.stack([terms, terms.abs(), terms.square(), terms.square()])
        found += space.weighed_part(every, layout.slices[name]).sum(1)
    sums.put(DERIVATIVE, space.total(found))


class _Sums:
    """Growing sums, by a name and a number."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, int], list[float]] = {}
        self.missing: set[str] = set()

    def add(self, name: str, number: int, terms: Tensor, axes: tuple[int, ...]) -> None:
        """Add terms over some axes, and their squares."""
        hashes, most = (terms.sum(axes), terms.abs().sum(axes)) if axes else (terms, terms.abs())
        self._add((name, 2 * number), hashes, most)
        self._add((name, 2 * number + 1), wide(hashes).square(), wide(most).square())

    def add_total(self, name: str, number: int, total: Tensor) -> None:
        """Add a term of which only the sum does not depend on batches."""
        self._add((name, 2 * number), total, total.abs())

    def put(self, name: str, found: Tensor) -> None:
        """Sums that all processes have: of terms, their magnitudes, their squares and these."""
        for number, (value, most) in enumerate(found.view(2, 2).tolist()):
            self._sums[name, number] = [value, most]

    def _add(self, key: tuple[str, int], terms: Tensor, most: Tensor) -> None:
        old = self._sums.get(key, [0.0, 0.0])
        self._sums[key] = [
            old[0] + float(terms.sum(dtype=widest(terms.device))),
            old[1] + float(most.sum(dtype=widest(most.device))),
        ]

    def parts(self) -> tuple[dict[tuple[str, int], list[float]], set[str]]:
        """The sums, and the names of what is missing."""
        return self._sums, self.missing

    def merge(self, parts: Sequence[tuple[dict[tuple[str, int], list[float]], set[str]]]) -> None:
        """Put the sums of several processes together, this one's among them."""
        keys = {key: None for sums, _ in parts for key in sums}
        each = {key: [sums[key] for sums, _ in parts if key in sums] for key in keys}
        self._sums = {key: [sum(pair[i] for pair in pairs) for i in range(2)] for key, pairs in each.items()}
        self.missing = {name for _, missing in parts for name in missing}

    def made(self) -> Numbers:
        """All sums of each name, in the order of their numbers; none of what is missing."""
        made: Numbers = {}
        for (name, _), (value, most) in sorted(self._sums.items()):
            made[name] = (*made.get(name, ()), (value, most))
        return {name: () if name in self.missing else found for name, found in made.items()}

"""A last linear layer on one batch, taken in chunks of positions: outputs of vocabulary size are never there as a whole.

With h the inputs of the layer, z = h Wᵀ + b its outputs and a tangent (ḣ, Ẇ, ḃ), a term with (u, u̇) gives at every position

    ż = W ḣ + Ẇ h + ḃ,    Wᵀu̇ + Ẇᵀu for h,    u̇ hᵀ + u ḣᵀ for W,    u̇ for b,

so that a chunk of positions needs its own outputs only.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from curvalg.errors import ProblemError
from curvalg.losses.closed_forms.softmax import SoftmaxLoss
from curvalg.problem.batch import Batch, Samples
from curvalg.problem.evaluation import Evaluation
from curvalg.problem.large_outputs.deferred import Deferred
from curvalg.problem.model.outputs import OutputForm, require_finite_output
from curvalg.tensors.random_numbers import uniforms

Cotangent = Callable[[Batch], Tensor]
"""A function batch -> u."""
Rate = Callable[[Batch], Callable[[Tensor], Tensor]]
"""batch -> (ż -> u̇)."""

BUFFERS = 6
"""Tensors of (positions, classes) that a chunk holds at a time: outputs, probabilities, r, ż, u̇ and one in between."""


class Head:
    """The last linear layer of a model on one batch.

    Args:
        deferred: what the model returned.
        evaluation: the batch; not held.

    Attributes:
        hidden: h (..., in), with its graph.
    """

    def __init__(self, deferred: Deferred, evaluation: Evaluation) -> None:
        problem, linear = evaluation.problem, deferred.linear
        assert isinstance(problem.loss, SoftmaxLoss)
        self.hidden = linear.hidden
        self.weight = linear.weight.detach()
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.name = linear.weight_name
        self.casts = deferred.casts
        self.dtype = torch.promote_types(deferred.dtype, torch.float32)
        self.classes = self.weight.shape[0]
        # Positions in the order of the target: its shape, and the row of h at each.
        self.shape = tuple(deferred.grid.squeeze(deferred.axis).shape)
        self.places = deferred.grid.reshape(-1)
        position = BUFFERS * self.classes * self.dtype.itemsize
        self.chunk = int(min(max(1, problem.output_memory // position), len(self.places)))
        self.target = _classes_last(evaluation.sample.target, deferred.axis)
        self.loss = dataclasses.replace(problem.loss, class_axis=1)  # type: ignore[type-var]
        self.start, again = evaluation.sample.start, evaluation.again()
        self.number: Callable[[], None] = lambda: again().problem.number_samples()
        self.samples: Samples = problem.samples
        self.totals = problem.totals
        self.index = evaluation.sample.index
        slices = problem.layout.slices
        self._weight_slice = slices.get(linear.weight_name)
        self._bias_slice = None if linear.bias_name is None else slices.get(linear.bias_name)
        self._uniforms: dict[tuple[int, int, torch.dtype], Tensor] = {}

    @property
    def positions_per_row(self) -> int:
        """The number of positions that a row of the batch has."""
        return math.prod(self.shape[1:])

    # -- chunks -----------------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[tuple[Tensor, Batch]]:
        """The batch that terms see for each chunk of positions (p), with outputs (p, classes); and the rows of h at them."""
        for start in range(0, len(self.places), self.chunk):
            part = slice(start, start + self.chunk)
            places = self.places[part]
            h = self._rows(self.hidden.detach())[places]
            yield places, self._batch(self._widened(F.linear(h, self.weight, self.bias)), part)

    def _batch(self, z: Tensor, part: slice) -> Batch:
        require_finite_output(z, self.index)
        loss, target, totals = self.loss, self._target(part), self.totals
        return PositionBatch(
            z,
            OutputForm(z, z.device),
            target,
            loss,
            lambda: loss.at(z, target),
            scale=totals.scale,
            count=totals.count,
            denominator=totals.denominator,
            misaligned=totals.misaligned,
            samples=self.samples,
            start=self.start,
            number=self.number,
            pullback=_refuse,
            per_sample=_refuse,
            layers=_refuse,
            noise=lambda samples, seed: self._noise(samples, seed)[:, part],
        )

    def _target(self, part: slice) -> Tensor:
        if self.target.ndim == len(self.shape):
            return self.target.reshape(-1)[part]
        # Probabilities of all positions side by side would be a copy of the target, as large as the outputs.
        numbers = torch.arange(part.start, min(part.stop, len(self.places)), device=self.target.device)
        return self.target[torch.unravel_index(numbers, self.shape)]

    def _noise(self, samples: int, seed: int) -> Tensor:
        """Uniform numbers (samples, positions), those of the whole batch."""
        key = (samples, seed, self.dtype)
        if key not in self._uniforms:
            drawn = uniforms(seed, samples, self.start, self.shape, self.dtype, self.weight.device)
            self._uniforms[key] = drawn.flatten(1)
        return self._uniforms[key]

    @staticmethod
    def _rows(t: Tensor) -> Tensor:
        return t.reshape(-1, t.shape[-1])

    def _widened(self, z: Tensor) -> Tensor:
        """Values of the layer in the form that the loss gets."""
        for dtype in self.casts:
            z = z.to(dtype)
        return z.to(self.dtype)

    def _narrowed(self, u: Tensor) -> Tensor:
        """Values from the loss in the form that the layer gets."""
        for dtype in (*reversed(self.casts), self.weight.dtype):
            u = u.to(dtype)
        return u

    # -- products -----------------------------------------------------------------------------------------------------------

    def pull(self, cotangent: Cotangent, total: Tensor | None = None) -> Tensor:
        """Jᵀu of the layer: what u gives for h, of its shape.

        Args:
            cotangent: batch -> u.
            total: a vector (D,) that what u gives for W and b is added to, in place; None: not needed.
        """
        result = torch.zeros_like(self._rows(self.hidden.detach()))
        for places, batch in self.batches():
            u = self._narrowed(cotangent(batch))
            result.index_add_(0, places, u @ self.weight)
            if total is not None:
                self._add_outer(total, u, self._rows(self.hidden.detach())[places])
                self._add_sum(total, u)
        return result.reshape(self.hidden.shape)

    def product(
        self, rows: Tensor, tangents: Tensor | None, cotangent: Cotangent | None, rate: Rate, total: Tensor
    ) -> Tensor:
        """The product of the layer for K columns: what it gives for h, shape (K, *h.shape).

        The outputs of a chunk are made once for all columns, and the columns taken one after the other.

        Args:
            rows: vectors (K, D), of which Ẇ and ḃ are parts.
            tangents: ḣ (K, *h.shape), or None where h depends on nothing.
            cotangent: batch -> u, or None where u ≡ 0.
            rate: batch -> (ż -> u̇).
            total: vectors (K, D) that what W and b get is added to, in place.
        """
        h_all = self._rows(self.hidden.detach())
        result = h_all.new_zeros(len(rows), *h_all.shape)
        for places, batch in self.batches():
            h, rates = h_all[places], rate(batch)
            u = None if cotangent is None else self._narrowed(cotangent(batch))
            for column, row in enumerate(rows):
                h_dot = None if tangents is None else self._rows(tangents[column])[places]
                weight_dot = self._part(row, self._weight_slice, self.weight)
                z_dot = self._tangent(h, h_dot, weight_dot, self._part(row, self._bias_slice, self.bias))
                u_dot = self._narrowed(rates(z_dot))
                del z_dot
                result[column].index_add_(0, places, u_dot @ self.weight)
                self._add_outer(total[column], u_dot, h)
                self._add_sum(total[column], u_dot)
                del u_dot  # not held while the next is made
                if u is not None and weight_dot is not None:
                    result[column].index_add_(0, places, u @ weight_dot)
                if u is not None and h_dot is not None:
                    self._add_outer(total[column], u, h_dot)
        return result.reshape(len(rows), *self.hidden.shape)

    def _tangent(self, h: Tensor, h_dot: Tensor | None, weight_dot: Tensor | None, bias_dot: Tensor | None) -> Tensor:
        """The tangent ż = W ḣ + Ẇ h + ḃ of a chunk."""
        z_dot = h.new_zeros(len(h), self.classes) if h_dot is None else h_dot @ self.weight.T
        if weight_dot is not None:
            z_dot.addmm_(h, weight_dot.T)
        if bias_dot is not None:
            z_dot += bias_dot
        return self._widened(z_dot)

    @staticmethod
    def _part(row: Tensor, place: slice | None, like: Tensor | None) -> Tensor | None:
        return None if place is None or like is None else row[place].view(like.shape).to(like.dtype)

    def _add_outer(self, total: Tensor, u: Tensor, h: Tensor) -> None:
        """Add u hᵀ to the total at the place of W."""
        if self._weight_slice is not None:
            total[self._weight_slice].view(self.weight.shape).addmm_(u.T.to(total.dtype), h.to(total.dtype))

    def _add_sum(self, total: Tensor, u: Tensor) -> None:
        """Add Σ u to the total at the place of b."""
        if self._bias_slice is not None:
            total[self._bias_slice] += u.sum(0)


class PositionBatch(Batch):
    """Some positions of a batch, each a row; draws are those of the whole batch.

    Args:
        noise: (samples, seed) -> uniform numbers (samples, positions).
    """

    def __init__(self, *args: Any, noise: Callable[[int, int], Tensor], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._noise = noise

    def uniform(self, samples: int, seed: int) -> Tensor:
        return self._noise(samples, seed)


def _refuse(*_: Any) -> NoReturn:
    raise ProblemError(
        "a batch of some positions has outputs and a loss, but neither parameters nor layers; a term that needs vjp, "
        "per_sample_gradients or layers must not declare acts_on"
    )


def _classes_last(target: Tensor, axis: int) -> Tensor:
    return target.movedim(axis, -1) if target.is_floating_point() else target


def why_not_a_head(deferred: Deferred, evaluation: Evaluation) -> str | None:
    """Why the loss cannot read these outputs in chunks, or None. What does not fit is for the loss itself to refuse."""
    loss, target = evaluation.problem.loss, evaluation.sample.target
    assert isinstance(loss, SoftmaxLoss)
    if deferred.device != evaluation.problem.device:
        return f"the layer is on {deferred.device}, the chosen parameters on {evaluation.problem.device}"
    if deferred.ndim < 2 or loss.class_axis % deferred.ndim != deferred.axis:
        return f"{loss.name} reads classes on axis {loss.class_axis}, where the layer has none"
    expected = deferred.shape if target.is_floating_point() else deferred.grid.squeeze(deferred.axis).shape
    return None if target.shape == expected else f"the target has the shape {tuple(target.shape)}"

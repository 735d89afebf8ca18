"""One batch, recorded once and multiplied many times. Rows of all operands are columns of the product: (K, ...)."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvalg.problem import Batch, Evaluation, Layout, Problem
from curvalg.problem.verification.reverse import Rows, TwiceBackward, reverse_tangents
from curvalg.tensors.backward import backward, backward_from
from curvalg.tensors.columns import chunked, grad_columns, mapped
from curvalg.tensors.graph import saved_bytes

Rate = Callable[[Tensor], Tensor]
"""ż -> u̇, both of the output's shape."""


class Cotangent(torch.autograd.Function):
    """A function with value u; on the way back the arriving ż = J v becomes u̇ and goes on to z.

    The context holds a function over detached data only, never what owns the graph: a cycle through the autograd engine
    is not collected.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, u: Tensor, rate: Rate) -> Tensor:
        return u.view_as(u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.rate = inputs[2]

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> tuple[Tensor, None, None]:
        return ctx.rate(tangent), None, None


class RecordedBatch(ABC):
    """A batch in the form in which products are taken.

    Args:
        evaluation: the batch; not held.
        keep: whether graphs survive a product.
    """

    batch: Batch

    def __init__(self, evaluation: Evaluation, keep: bool) -> None:
        self.layout: Layout = evaluation.problem.layout
        self.device = evaluation.problem.device
        self.index = evaluation.sample.index
        self.keep = keep

    def directions(self, rows: Tensor) -> list[Tensor]:
        """The vectors (K, D) as one tensor (K, *shape) per parameter, in its dtype."""
        columns = rows.shape[0]
        parts = zip(rows.split(self.layout.sizes, 1), self.layout.shapes.values(), strict=True)
        tensors = [t.reshape(columns, *shape) for t, shape in parts]
        if self.layout.uniform:
            return tensors
        return [t.to(dtype) for t, dtype in zip(tensors, self.layout.dtypes.values(), strict=True)]

    def gather(self, gradients: list[Tensor | None], columns: int) -> Tensor:
        """Gradients (K, *shape) of the parameters (None: zero) as vectors (K, D)."""
        dtype = self.layout.dtype
        flat = [
            torch.zeros(columns, size, dtype=dtype, device=self.device) if g is None else g.reshape(columns, size)
            for g, size in zip(gradients, self.layout.sizes, strict=True)
        ]
        return torch.cat(flat if self.layout.uniform else [t.to(dtype) for t in flat], 1)

    @abstractmethod
    def graphs(self) -> Iterable[Tensor | GradientEdge]:
        """Tensors whose graphs are kept, or edges where the tensors themselves are not."""

    def over(self, problem: Problem) -> RecordedBatch | None:
        """The recording for some of its parameters, sharing its graph; None where that is impossible."""
        return None

    def _twin(self, problem: Problem) -> tuple[Any, list[int]]:
        """A copy in another layout, and where its parameters are among those of this one."""
        twin = copy.copy(self)
        twin.layout = problem.layout
        places = {name: i for i, name in enumerate(self.layout.names)}
        return twin, [places[name] for name in problem.layout.names]


Graph = tuple[Tensor, list[Tensor], Batch]
"""z with its graph, the leaves that it depends on, and what terms see."""


def graph(evaluation: Evaluation) -> Graph:
    """The graph of one model call."""
    z, leaves, form = evaluation.record()
    batch, again, layout, device = (
        evaluation.batch(z, form),
        evaluation.again(),
        evaluation.problem.layout,
        evaluation.problem.device,
    )
    alive = ref(z)  # the batch must not hold the graph
    problem = ref(evaluation.problem)

    def pull(u: Tensor) -> Tensor:
        if (output := alive()) is None or (owner := problem()) is None:
            return again().pull(u)
        return owner.as_part(layout.gather(backward([output], leaves, [u], retain_graph=True), device))

    batch.pull_by(pull)
    return z, leaves, batch


class Staged(RecordedBatch):
    """A recording whose product has two stages: all tangents, then the result for the rates made of them."""

    @abstractmethod
    def tangent(self, rows: Tensor, chunk: int) -> Tensor:
        """Tangents J v for vectors (K, D), shape (K, *output.shape)."""

    @abstractmethod
    def finish(self, rows: Tensor, rates: Tensor, chunk: int) -> Tensor:
        """Products (∂_v J)ᵀu + Jᵀu̇ for vectors (K, D) and rates (K, *output.shape), shape (K, D)."""


class SinglePass(RecordedBatch):
    """A recording of z, u = Cotangent(z) and G = J(θ)ᵀu: one backward of G along v is (∂_v J)ᵀu + Jᵀu̇.

    Args:
        evaluation: the batch.
        cotangent: batch -> u.
        rate: batch -> (ż -> u̇).
        keep: whether the graph survives a product.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        cotangent: Callable[[Batch], Tensor],
        rate: Callable[[Batch], Rate],
        keep: bool,
    ) -> None:
        super().__init__(evaluation, keep)
        z, self.leaves, form = evaluation.record()
        self.batch = evaluation.batch(z, form)
        u = Cotangent.apply(z, cotangent(self.batch), rate(self.batch))
        self.gradients = evaluation.differentiate(z, self.leaves, u)
        self.operations = evaluation.second_operations
        # A single column goes in whole: autograd cuts it into pieces in a tenth of the time that Python needs.
        self.whole = self._joined() if keep and self.layout.uniform else None

    def _joined(self) -> GradientEdge | None:
        """A tensor where a cotangent (D,) of all gradients at once arrives."""
        parts = [
            torch.zeros(size, dtype=self.layout.dtype, device=self.device) if g is None else g.reshape(-1)
            for g, size in zip(self.gradients, self.layout.sizes, strict=True)
        ]
        joined = torch.cat(parts)
        return get_gradient_edge(joined) if joined.requires_grad else None

    def graphs(self) -> Iterable[Tensor]:
        return [g for g in self.gradients if g is not None]

    def over(self, problem: Problem) -> SinglePass:
        twin, places = self._twin(problem)
        twin.leaves, twin.gradients = [self.leaves[i] for i in places], [self.gradients[i] for i in places]
        twin.whole = twin._joined() if self.whole is not None else None
        return twin  # type: ignore[no-any-return]

    def multiply(self, rows: Tensor, chunk: int) -> Tensor:
        """The product with vectors (K, D), shape (K, D)."""
        if rows.shape[0] == 1:  # the usual case, where every call counts
            if self.whole is None:
                grads = backward(self.gradients, self.leaves, self.layout.tangents(rows[0]), retain_graph=self.keep)
            else:
                grads = backward_from(self.whole, self.leaves, rows[0], retain_graph=self.keep)
            return self.layout.gather(grads, self.device)[None]
        several = rows.shape[0] > chunk

        def product(part: Tensor) -> Tensor:
            grads = grad_columns(self.gradients, self.leaves, self.directions(part), retain=self.keep or several)
            return self.gather(grads, part.shape[0])

        return chunked(product, chunk, rows)


class TwoStage(Staged):
    """A recording of z and, with u a leaf, G = J(θ)ᵀu: first all ż = J v, then (∂_v J)ᵀu + Jᵀu̇ for a given u̇.

    Totals of the whole data set stand between the two. They must not enter a Function's backward: under vmap one column
    would meet all.

    Args:
        evaluation: the batch.
        cotangent: batch -> u, or None where u ≡ 0 and only tangents are taken from G.
        keep: whether the graph survives a product.
        like: the graph, where it is there already.
    """

    ROUTE = TwiceBackward.NAME

    def __init__(
        self,
        evaluation: Evaluation,
        cotangent: Callable[[Batch], Tensor] | None,
        keep: bool,
        like: Graph | None = None,
    ) -> None:
        super().__init__(evaluation, keep)
        self.z, self.leaves, self.batch = like or graph(evaluation)
        self.curved = cotangent is not None
        self.route: TwiceBackward | Rows
        if (
            cotangent is None and evaluation.problem.group.sharded
        ):  # where there is no other way that all processes can take
            self.route = TwiceBackward(evaluation, self.z, self.leaves)
        elif cotangent is None:
            self.route = reverse_tangents(evaluation, self.z, self.leaves)
        else:
            self.route = TwiceBackward(evaluation, self.z, self.leaves, cotangent(self.batch).detach())
        self.gradients = self.route.gradients

    def graphs(self) -> Iterable[Tensor]:
        return [self.z, *(g for g in self.gradients if g is not None), *self.route.held()]

    def over(self, problem: Problem) -> TwoStage:
        twin, places = self._twin(problem)
        twin.leaves, twin.route = [self.leaves[i] for i in places], self.route.over(places)
        twin.gradients = twin.route.gradients
        return twin  # type: ignore[no-any-return]

    def tangent(self, rows: Tensor, chunk: int) -> Tensor:
        def push(part: Tensor) -> Tensor:
            if part.shape[0] == 1:
                return self.route.push([v[0] for v in self.directions(part)])[None]
            return self.route.push(self.directions(part), batched=True)

        return chunked(push, chunk, rows)

    def finish(self, rows: Tensor, rates: Tensor, chunk: int) -> Tensor:
        retain = self.keep or rows.shape[0] > chunk

        def product(part: Tensor, udot: Tensor) -> Tensor:
            if self.curved:
                outputs, cotangents = [*self.gradients, self.z], [*self.directions(part), udot]
            else:
                outputs, cotangents = [self.z], [udot]
            return self.gather(grad_columns(outputs, self.leaves, cotangents, retain=retain), part.shape[0])

        return chunked(product, chunk, rows, rates)


class Pushed(Staged):
    """A recording of z with its graph, and J v by a function that needs no graph (forward AD or a linearised program).

    Args:
        evaluation: the batch.
        push: a vector (D,) -> J v.
        keep: whether the graph survives a product.
        like: the graph, where it is there already.
    """

    def __init__(
        self, evaluation: Evaluation, push: Callable[[Tensor], Tensor], keep: bool, like: Graph | None = None
    ) -> None:
        super().__init__(evaluation, keep)
        self.z, self.leaves, self.batch = like or graph(evaluation)
        self.push = push

    def graphs(self) -> Iterable[Tensor]:
        return [self.z]

    def tangent(self, rows: Tensor, chunk: int) -> Tensor:
        return chunked(lambda part: mapped(self.push, part), chunk, rows)

    def finish(self, rows: Tensor, rates: Tensor, chunk: int) -> Tensor:
        """Products Jᵀu̇ for rates (K, *output.shape), shape (K, D)."""
        retain = self.keep or rows.shape[0] > chunk

        def product(udot: Tensor) -> Tensor:
            return self.gather(grad_columns([self.z], self.leaves, [udot], retain=retain), udot.shape[0])

        return chunked(product, chunk, rates)


def graph_bytes(recorded: RecordedBatch) -> int:
    """Memory that the graphs of a recorded batch hold, as far as autograd's nodes show it: distinct storages, each once."""
    return saved_bytes(recorded.graphs())

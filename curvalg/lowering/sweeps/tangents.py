"""Recordings without second derivatives, with tangents J v by another route than the recorded graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from curvalg.lowering.sweeps.recordings import Graph, Pushed, Staged
from curvalg.problem import Batch, Evaluation


class Transient(Staged):
    """A batch for one product with one column: forward AD, then one backward; two model calls and little memory."""

    def __init__(self, evaluation: Evaluation) -> None:
        super().__init__(evaluation, keep=False)
        self.evaluation = evaluation
        self._batch: Batch | None = None

    @property
    def batch(self) -> Batch:  # type: ignore[override]
        if self._batch is None:
            self._batch = self.evaluation.evaluate()
        return self._batch

    def graphs(self) -> Iterable[Tensor]:
        return []

    def tangent(self, rows: Tensor, chunk: int) -> Tensor:
        """The tangent J v for one vector (1, D), shape (1, *output.shape)."""
        self._batch, tangent = self.evaluation.push(rows[0])
        return tangent[None]

    def finish(self, rows: Tensor, rates: Tensor, chunk: int) -> Tensor:
        """The product Jᵀu̇ for one rate, shape (1, D)."""
        self._batch = None  # released before the model call, which is the peak
        return self.evaluation.pull(rates[0], pushed=True)[None]


class ForwardAD(Pushed):
    """Tangents by forward AD, with a forward pass in every product."""

    ROUTE = "forward AD"

    def __init__(self, evaluation: Evaluation, keep: bool, like: Graph | None = None) -> None:
        again = evaluation.again()
        super().__init__(evaluation, lambda v: again().push(v)[1], keep, like)

    def tangent(self, rows: Tensor, chunk: int) -> Tensor:
        # Forward AD is not batched over columns: a model call each.
        return torch.stack([self.push(row) for row in rows])


class Linearized(Pushed):
    """Tangents by a program that ``torch.func.linearize`` traced: no model call, but used only when verified."""

    ROUTE = "a linearised program"

    def __init__(self, evaluation: Evaluation, keep: bool, compiler: str | None = None) -> None:
        layout = evaluation.problem.layout
        values = evaluation.values()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer about its own constants
            _, program = torch.func.linearize(lambda ps: evaluation.run(ps)[0], values)
        self.constants = _constants(program)

        def push(v: Tensor) -> Tensor:
            result: Tensor = program(layout.tangents(v))
            return result

        super().__init__(evaluation, push, keep)
        self.compiled = None if compiler is None else torch.compile(push, backend=compiler, dynamic=False)

    def tangent(self, rows: Tensor, chunk: int) -> Tensor:
        if self.compiled is None or rows.shape[0] > 1:  # several columns are batched, which is another program
            return super().tangent(rows, chunk)
        result: Tensor = self.compiled(rows[0])[None]
        return result

    def graphs(self) -> Iterable[Tensor]:
        return [self.z, *self.constants]


def decline_linearized(new: Linearized, old: Staged, rows: Tensor) -> str | None:
    """Why a linearised program must not be used, or None.

    Some programs write into their own constants (recurrent layers, in-place operations, some norms): right once, wrong
    from the second call on, without an error. So no constant may change its version, and three products must agree with
    the recorded graph.
    """
    if not new.constants:
        return "its constants cannot be found, so that it cannot be verified"
    versions = [t._version for t in new.constants]
    for i in range(3):
        v = rows * (i + 1) + i
        got, expected = new.tangent(v, 1), old.tangent(v, 1)
        tolerance = torch.finfo(rows.dtype).eps ** 0.75 * expected.norm()
        if not bool((got - expected).norm() <= tolerance):
            return f"call {i + 1} differs from the recorded graph"
    if [t._version for t in new.constants] != versions:
        return "it writes into its own constants"
    return None


def _constants(program: Callable[..., Any]) -> list[Tensor]:
    """The tensors that a linearised program holds."""
    cells = getattr(program, "__closure__", None) or ()
    graphs = [c.cell_contents for c in cells if isinstance(c.cell_contents, fx.GraphModule)]
    found: dict[int, Tensor] = {}
    for graph in graphs:
        for child in graph.modules():
            for t in [*vars(child).values(), *child._parameters.values(), *child._buffers.values()]:
                if isinstance(t, Tensor):
                    found[id(t)] = t
    return list(found.values())

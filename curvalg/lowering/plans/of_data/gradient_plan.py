"""The plan of a term that multiplies by gradients of the loss at other parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvalg.expr.term import GradientTerm
from curvalg.lowering.lines import indent
from curvalg.lowering.plans.plan import Plan
from curvalg.lowering.sweeps.contract import call, fitting
from curvalg.problem import GradientField, Problem, Snapshot
from curvalg.problem.passes.first_order import gradient_over


@dataclass(frozen=True)
class GradientPlan(Plan):
    """One column after the other, by as many gradients as the term takes.

    Gradients are sums over the data of all processes already: no sum of products is made.
    """

    problem: Problem
    term: GradientTerm

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        with snapshot.lock:
            self.problem.group.multiplying(x)
            return torch.stack([self._column(snapshot, column) for column in x.T.contiguous()], 1)

    def prepare(self, snapshot: Snapshot) -> None:
        with snapshot.lock:
            _ = self._field(snapshot).here

    @property
    def passes(self) -> int:
        return 1

    def lines(self, snapshot: Snapshot) -> list[str]:
        return [f"gradients at other parameters: {self.term}", *indent(self.term.lines(self._field(snapshot)))]

    def _column(self, snapshot: Snapshot, v: Tensor) -> Tensor:
        product = call(self.term, "multiply", self._field(snapshot), v)
        return fitting(self.term, "multiply", product, v, like_what="the vector")

    def _field(self, snapshot: Snapshot) -> GradientField:
        problem = self.problem
        kept = problem.cached(snapshot).get("of gradients", self.term, dict[str, Any])
        return GradientField(problem, snapshot, lambda at: gradient_over(problem, problem.evaluations(at)), kept)

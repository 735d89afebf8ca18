"""Matrices with a side in output space: the Jacobian, its transpose, the loss Hessian."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from curvalg.lowering.blocks.output_rows import output_sizes
from curvalg.lowering.plans.plan import Plan
from curvalg.problem import Evaluation, Layout, Problem, Snapshot
from curvalg.problem.verification.reverse import Rows, TwiceBackward, reverse_tangents
from curvalg.tensors.backward import backward_columns

AT_A_TIME = 64
"""Columns of an explicit Jacobian that are taken together."""


def _pushed(route: TwiceBackward | Rows, layout: Layout, x: Tensor) -> Tensor:
    """J X by a recorded route, (outputs, K)."""
    return torch.stack([route.push(layout.tangents(v)).reshape(-1).to(x.dtype) for v in x.unbind(1)], 1)


@dataclass(frozen=True)
class OutputPlan(Plan):
    """The Jacobian, its transpose, or the loss Hessian: a side in output space, rows in the order of the data."""

    problem: Problem
    kind: Literal["jacobian", "jacobian.T", "loss_hessian"]

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        with snapshot.lock:
            if self.kind == "jacobian":
                return torch.cat([self._push(e, x) for e in self._evaluations(snapshot)])
            parts = zip(self._evaluations(snapshot), x.split(output_sizes(self.problem, snapshot)), strict=True)
            if self.kind == "loss_hessian":
                return torch.cat([self._curve(evaluation, t) for evaluation, t in parts])
            total = self.problem.sum()
            for evaluation, u in parts:
                total.add(self._pull(*evaluation.record()[:2], u))
            return total.value  # type: ignore[no-any-return]

    def dense(self, snapshot: Snapshot) -> Tensor | None:
        """J or Jᵀ by as many backward passes as a batch has outputs, or as there are parameters, whichever are fewer."""
        if self.kind == "loss_hessian":
            return None
        rows, problem = [], self.problem
        with snapshot.lock:
            for evaluation in self._evaluations(snapshot):
                z, leaves, _ = evaluation.record()
                count, size = z.numel(), problem.size
                eye = torch.eye(min(count, size), dtype=problem.dtype, device=problem.device)
                if count <= size:
                    rows.append(torch.cat([self._pull(z, leaves, u) for u in eye.split(AT_A_TIME, 1)], 1).T)
                else:
                    route = reverse_tangents(evaluation, z, leaves)
                    rows.append(torch.cat([_pushed(route, problem.layout, v) for v in eye.split(AT_A_TIME, 1)], 1))
        whole = torch.cat(rows)
        return whole.T if self.kind == "jacobian.T" else whole

    def _push(self, evaluation: Evaluation, x: Tensor) -> Tensor:
        """J X for one batch, by one model call for several columns."""
        if x.shape[1] == 1:
            return evaluation.push(x[:, 0])[1].reshape(-1, 1).to(x.dtype)
        z, leaves, _ = evaluation.record()
        return _pushed(reverse_tangents(evaluation, z, leaves), self.problem.layout, x)

    def _pull(self, z: Tensor, leaves: Sequence[Tensor], u: Tensor) -> Tensor:
        """Jᵀ U for one batch, (D, K)."""
        found, _ = backward_columns(z, leaves, u.T.reshape(-1, *z.shape).to(z.dtype))
        flat = [
            u.new_zeros(u.shape[1], leaf.numel()) if g is None else g.reshape(u.shape[1], leaf.numel())
            for g, leaf in zip(found, leaves, strict=True)
        ]
        return torch.cat([t.to(u.dtype) for t in flat], 1).T

    def _curve(self, evaluation: Evaluation, t: Tensor) -> Tensor:
        """B T for one batch."""
        batch = evaluation.evaluate()
        columns = [batch.loss_hvp(column.reshape(batch.output.shape)).reshape(-1) for column in t.unbind(1)]
        return torch.stack(columns, 1)

    def _evaluations(self, snapshot: Snapshot) -> Iterator[Evaluation]:
        return self.problem.evaluations(snapshot, order_matters=True)

    def lines(self, snapshot: Snapshot) -> list[str]:
        return [f"{self.kind}: one pass over the data, batch by batch"]

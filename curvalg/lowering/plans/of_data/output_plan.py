"""Matrices with a side in output space: the Jacobian, its transpose, the loss Hessian."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from curvalg.errors import ProblemError
from curvalg.lowering.blocks.output_rows import output_sizes
from curvalg.lowering.plans.plan import Plan
from curvalg.problem import Evaluation, Layout, Problem, Snapshot
from curvalg.problem.layers.recorded import record_layers
from curvalg.problem.verification.reverse import Rows, TwiceBackward, reverse_tangents
from curvalg.tensors.backward import backward_columns

AT_A_TIME = 64
"""Columns of an explicit Jacobian that are taken together."""


def _pushed(route: TwiceBackward | Rows, layout: Layout, x: Tensor) -> Tensor:
    """Products J X by a recorded route, (outputs, K)."""
    return torch.stack([route.push(layout.tangents(v)).reshape(-1).to(x.dtype) for v in x.unbind(1)], 1)


def _stacked(like: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """The rows of all batches of this process, which may have none."""
    return torch.cat(list(rows)) if rows else like.new_zeros(0, like.shape[1])


@dataclass(frozen=True)
class OutputPlan(Plan):
    """The plan of the Jacobian, its transpose or the loss Hessian; rows of outputs in the order of the data."""

    problem: Problem
    kind: Literal["jacobian", "jacobian.T", "loss_hessian"]

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        group, sizes = self.problem.group, output_sizes(self.problem, snapshot)
        with snapshot.lock:
            group.multiplying(x)
            if self.kind == "jacobian":
                return group.rows(_stacked(x, [self._push(e, x) for e in self._evaluations(snapshot)]))
            parts = zip(self._evaluations(snapshot), x[sizes.places].split(list(sizes.here)), strict=True)
            if self.kind == "loss_hessian":
                return group.rows(_stacked(x, [self._curve(evaluation, t) for evaluation, t in parts]))
            total = self.problem.sum()
            for evaluation, u in parts:
                total.add(self._pull(*evaluation.record()[:2], u))
            return self.problem.totalled({"product": total})["product"]  # type: ignore[no-any-return]

    def dense(self, snapshot: Snapshot) -> Tensor | None:
        """The matrix J or Jᵀ: by a backward pass for each output of a row, from which layers give the gradients of all rows.

        Where rows are not computed apart, by as many as a batch has outputs, or as there are parameters, if fewer.
        """
        if self.kind == "loss_hessian":
            return None
        rows, problem = [], self.problem
        with snapshot.lock:
            for evaluation in self._evaluations(snapshot):
                if (apart := self._by_rows(evaluation)) is not None:
                    rows.append(apart)
                    continue
                z, leaves, _ = evaluation.record()
                count, size = z.numel(), problem.size
                eye = torch.eye(min(count, size), dtype=problem.dtype, device=problem.device)
                if count <= size:
                    rows.append(torch.cat([self._pull(z, leaves, u) for u in eye.split(AT_A_TIME, 1)], 1).T)
                else:
                    route = reverse_tangents(evaluation, z, leaves)
                    rows.append(torch.cat([_pushed(route, problem.layout, v) for v in eye.split(AT_A_TIME, 1)], 1))
            whole = problem.group.rows(
                _stacked(torch.empty(0, problem.size, dtype=problem.dtype, device=problem.device), rows)
            )
        return whole.T if self.kind == "jacobian.T" else whole

    def _by_rows(self, evaluation: Evaluation) -> Tensor | None:
        """The rows of J of one batch from layer inputs and deltas; None where the rows of the batch are not independent."""
        problem = self.problem
        if problem.model.batch_statistics or problem.factored is False or problem.totals.misaligned is not None:
            return None
        try:
            recorded = record_layers(evaluation)
            output = recorded.batch.output
            count, width = output.shape[0], output[0].numel() if len(output) else 0
            if not count > 1 or width >= problem.size:
                return None
            unit = torch.eye(width, dtype=output.dtype, device=output.device).reshape(width, 1, *output.shape[1:])
            rows = torch.zeros(count, width, problem.size, dtype=problem.dtype, device=problem.device)
            for part in torch.arange(width, device=output.device).split(AT_A_TIME):
                for record in recorded.records(unit[part].expand(-1, *output.shape).contiguous()):
                    for name, gradients in record.explicit().items():
                        rows[:, part, problem.layout.slices[name]] = gradients.flatten(2).transpose(0, 1).to(rows.dtype)
        except ProblemError:  # another way needs less of the model
            return None
        return rows.flatten(0, 1)

    def _push(self, evaluation: Evaluation, x: Tensor) -> Tensor:
        """Products J X for one batch, by one model call for several columns."""
        if x.shape[1] == 1:
            return evaluation.push(x[:, 0])[1].reshape(-1, 1).to(x.dtype)
        z, leaves, _ = evaluation.record()
        return _pushed(reverse_tangents(evaluation, z, leaves), self.problem.layout, x)

    def _pull(self, z: Tensor, leaves: Sequence[Tensor], u: Tensor) -> Tensor:
        """Products Jᵀ U for one batch, (D, K)."""
        found, _ = backward_columns(z, leaves, u.T.reshape(-1, *z.shape).to(z.dtype))
        flat = [
            u.new_zeros(u.shape[1], leaf.numel()) if g is None else g.reshape(u.shape[1], leaf.numel())
            for g, leaf in zip(found, leaves, strict=True)
        ]
        return torch.cat([t.to(u.dtype) for t in flat], 1).T

    def _curve(self, evaluation: Evaluation, t: Tensor) -> Tensor:
        """Products B T for one batch."""
        batch = evaluation.evaluate()
        columns = [batch.loss_hvp(column.reshape(batch.output.shape)).reshape(-1) for column in t.unbind(1)]
        return torch.stack(columns, 1)

    def _evaluations(self, snapshot: Snapshot) -> Iterator[Evaluation]:
        return self.problem.evaluations(snapshot, order_matters=True)

    def lines(self, snapshot: Snapshot) -> list[str]:
        return [f"{self.kind}: one pass over the data, batch by batch"]

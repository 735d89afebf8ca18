"""Local terms that share one pass over the data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from curvalg.expr.node import Expr
from curvalg.lowering.lines import indent
from curvalg.lowering.plans.plan import Plan
from curvalg.lowering.sweeps.linearization import Linearization, linearization
from curvalg.lowering.sweeps.sweep import Sweep
from curvalg.problem import Problem, Snapshot
from curvalg.problem.kept.reads import Reads
from curvalg.problem.verification.tangent_checks import TangentNotes


@dataclass(frozen=True)
class SweepPlan(Plan):
    """The plan of local terms in one sweep, one column after the other."""

    problem: Problem
    sweep: Sweep
    expr: Expr

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        with snapshot.lock:
            return linearization(self.problem, snapshot, self.sweep).product(self.problem, snapshot, x.T.contiguous()).T

    def prepare(self, snapshot: Snapshot) -> None:
        with snapshot.lock:
            linearization(self.problem, snapshot, self.sweep).prepare(self.problem, snapshot)

    def release(self, snapshot: Snapshot) -> None:
        linearization(self.problem, snapshot, self.sweep).drop()

    def reads(self, snapshot: Snapshot, columns: int) -> Reads | str:
        kept = linearization(self.problem, snapshot, self.sweep)
        if not kept.complete:
            return "since not all batches are kept"
        return Reads(tuple(kept.batches.values()), (kept,))

    @property
    def passes(self) -> int:
        return 1

    def lines(self, snapshot: Snapshot) -> list[str]:
        kept = linearization(self.problem, snapshot, self.sweep)
        return [f"sweep: {self.expr}", *indent(_how(self.sweep, self.problem, kept))]


def _how(sweep: Sweep, problem: Problem, kept: Linearization) -> list[str]:
    lines = []
    if sweep.curved and sweep.dataset_terms:
        lines.append("recorded: one backward for the tangent, one for the product")
    elif sweep.curved:
        lines.append("recorded: one backward for all terms")
    elif kept.keeping:
        lines.append(f"recorded: tangent by {kept.route}, then one backward")
    else:
        reason = problem.noted(TangentNotes).no_forward_ad
        push = "forward AD" if reason is None else f"two backward passes (no forward AD: {reason})"
        lines.append(f"fresh: tangent by {push}, then one backward, with a model call each")
    if sweep.reduces:
        lines.append(f"a pass before it for the totals of {', '.join(t.label for t in sweep.reduces)}")
    elif sweep.dataset_terms:
        lines.append(f"statistics of {', '.join(t.label for t in sweep.dataset_terms)} prepared in one pass and kept")
    if kept.complete:
        lines.append(f"kept: {len(kept.batches)} batches, {kept.nbytes / 2**20:.3g} MiB; no model call in a product")
    elif kept.keeping:
        lines.append("kept from the first product on, within the budget")
    elif sweep.curved:
        lines.append("fresh: recorded in every product, 1 model call a batch")
    return [*lines, *kept.notes.values()]

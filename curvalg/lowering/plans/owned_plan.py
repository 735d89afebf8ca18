"""Products with matrices whose blocks lie with the owners of the layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from curvalg.expr import Expr
from curvalg.lowering.blocks.complete_blocks import resolve
from curvalg.lowering.blocks.owned_matrix import own_part
from curvalg.lowering.lines import indent
from curvalg.lowering.plans.plan import Plan
from curvalg.problem import Problem, Snapshot
from curvalg.problem.kept.reads import Reads
from curvalg.problem.model.sharded.owned_layers import OwnedLayers
from curvalg.rewrite import simplify


@dataclass(frozen=True)
class OwnedPlan(Plan):
    """Vectors go to the owners of the layers, are multiplied there, and come back: two exchanges a product.

    Args:
        own: the plan over the layers of this process; None: it owns none.
        layers: of all processes.
        problem: whose parameters lie in parts.
    """

    own: Plan | None
    layers: OwnedLayers
    problem: Problem

    @property
    def inner(self) -> tuple[Plan, ...]:
        return () if self.own is None else (self.own,)

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        group = self.problem.group
        with snapshot.lock:  # exchanges of one thread at a time
            whole = self.layers.to_owners(x, group)
            made = whole if self.own is None else self.own.apply(snapshot, whole)
            return self.layers.from_owners(made, group)

    def reads(self, snapshot: Snapshot, columns: int) -> Reads | str:
        return "since processes exchange what they computed"

    def lines(self, snapshot: Snapshot) -> list[str]:
        names, every = len(self.layers.own), sum(map(len, self.layers.names))
        head = f"layers by their owners, {names} of {every} parameters by this process; two exchanges a product"
        return [head, *(indent(self.own.lines(snapshot)) if self.own is not None else ())]


def owned_plan(expr: Expr, problem: Problem, planner: Callable[[Expr, Problem], Plan]) -> OwnedPlan:
    """The plan of a layerwise expression, all of it bound.

    Args:
        expr: the expression.
        problem: whose parameters lie in parts.
        planner: gives the plan of what this process owns.
    """
    own, place = own_part(expr)
    if own is None or place.on is None:
        return OwnedPlan(None, place.layers, problem)
    facts = place.on.facts
    resolved = simplify(resolve(simplify(own, facts).expr, place.on), facts).expr
    return OwnedPlan(planner(resolved, place.on), place.layers, problem)

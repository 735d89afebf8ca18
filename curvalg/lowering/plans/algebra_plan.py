"""Plans: what an expression becomes on a problem before any number is computed.

A plan is a small tree. Terms of one sum that share their input share a sweep; a product is one plan after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvalg.expr import EntryRestriction
from curvalg.expr.node import Expr
from curvalg.expr.nodes.arrays import ArrayLeaf
from curvalg.lowering.blocks.chosen_entries import ChosenEntries, choose_entries, part_layout
from curvalg.lowering.blocks.output_rows import output_sizes
from curvalg.lowering.blocks.rows import RowRanges, by_blocks
from curvalg.lowering.lines import alike, indent
from curvalg.lowering.matrices import array_leaves as leaves
from curvalg.lowering.plans.plan import Plan
from curvalg.problem import Problem, Snapshot
from curvalg.problem.kept.reads import Reads


@dataclass(frozen=True)
class SumPlan(Plan):
    """Several plans with one input, and a multiple of the identity."""

    parts: tuple[tuple[float, Plan], ...]
    shift: float

    @property
    def inner(self) -> tuple[Plan, ...]:
        return tuple(part for _, part in self.parts)

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        if not self.parts:
            return self.shift * x
        (coefficient, first), *rest = self.parts
        total = coefficient * first.apply(snapshot, x) if coefficient != 1 else first.apply(snapshot, x)
        for coefficient, part in rest:
            total = total.add_(part.apply(snapshot, x), alpha=coefficient)
        return total.add_(x, alpha=self.shift) if self.shift else total

    def lines(self, snapshot: Snapshot) -> list[str]:
        lines = ["sum"]
        for coefficient, part in self.parts:
            head, *tail = part.lines(snapshot)
            lines += indent([head if coefficient == 1 else f"{coefficient:g} * {head}", *tail])
        return [*lines, f"  {self.shift:g} * identity"] if self.shift else lines


@dataclass(frozen=True)
class ProductPlan(Plan):
    """Plans applied from right to left."""

    factors: tuple[Plan, ...]

    @property
    def inner(self) -> tuple[Plan, ...]:
        return self.factors

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            x = factor.apply(snapshot, x)
        return x

    def lines(self, snapshot: Snapshot) -> list[str]:
        return [
            "product, from the last to the first",
            *(line for f in self.factors for line in indent(f.lines(snapshot))),
        ]


@dataclass(frozen=True)
class LeafPlan(Plan):
    """The plan of an array leaf or its transpose."""

    leaf: ArrayLeaf
    transpose: bool = False

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        return leaves.multiply(self.leaf, x, self.transpose)

    def reads(self, snapshot: Snapshot, columns: int) -> Reads | str:
        return Reads((self.leaf,))

    def lines(self, snapshot: Snapshot) -> list[str]:
        return [f"arrays: {self.leaf}{'.T' if self.transpose else ''}"]


@dataclass(frozen=True)
class BlocksPlan(Plan):
    """Blocks over disjoint groups of parameters; what no block covers is zero."""

    blocks: tuple[tuple[RowRanges, Plan, str], ...]

    @property
    def inner(self) -> tuple[Plan, ...]:
        return tuple(part for _, part, _ in self.blocks)

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        rows = [places for places, _, _ in self.blocks]
        return by_blocks(rows, x, lambda i, part: self.blocks[i][1].apply(snapshot, part))

    def lines(self, snapshot: Snapshot) -> list[str]:
        passes = self.passes
        cost = f"; about {passes} passes a product" if passes > 1 else ""
        parts = [(label, plan.lines(snapshot)) for _, plan, label in self.blocks]
        count = len(self.blocks)
        head = "one diagonal block" if count == 1 else f"{count} diagonal blocks, one after the other{cost}"
        return [head, *indent(alike(parts))]


@dataclass(frozen=True)
class SubmatrixPlan(Plan):
    """Some rows and columns of a plan on all parameters.

    Args:
        whole: the plan.
        size: number of all parameters.
        places: of those that are kept.
        domain: whether the columns are parameters.
        codomain: whether the rows are.
        label: names of the kept parameters.
    """

    whole: Plan
    size: int
    places: RowRanges | ChosenEntries
    domain: bool
    codomain: bool
    label: str

    @property
    def inner(self) -> tuple[Plan, ...]:
        return (self.whole,)

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        if self.domain:
            padded = x.new_zeros(self.size, x.shape[1])
            self.places.put(padded, x)
            x = padded
        result = self.whole.apply(snapshot, x)
        return self.places.take(result) if self.codomain else result

    def lines(self, snapshot: Snapshot) -> list[str]:
        return [f"sub-matrix over {self.label}", *indent(self.whole.lines(snapshot))]


def entry_plan(expr: EntryRestriction, problem: Problem, plan: Callable[[Expr, Problem], Plan]) -> Plan:
    """The plan of a sub-matrix over entries: some rows and columns of the one over their parameters."""
    chosen, inner = choose_entries(problem, expr.entries), expr.expr
    if isinstance(
        inner, ArrayLeaf
    ):  # made of products with the sub-matrix; what is given whole is restricted by name first
        return LeafPlan(inner)
    domain, codomain = (space == "parameters" for space in (inner.domain, inner.codomain))
    return SubmatrixPlan(plan(inner, problem), chosen.among, chosen, domain, codomain, str(expr.entries))


@dataclass(frozen=True)
class UnboundPlan(Plan):
    """A matrix whose arrays need a pass over the data that has not been made yet."""

    expr: Expr

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        raise AssertionError("matrix terms are bound before a product")

    def lines(self, snapshot: Snapshot) -> list[str]:
        return [f"matrix: {self.expr}, accumulated over the data at the first product and kept"]


@dataclass(frozen=True)
class ZeroPlan(Plan):
    """The plan of zero; a rectangular one has the rows of its codomain."""

    problem: Problem
    codomain: str | None
    params: tuple[str, ...] | None = None

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        rows = {
            None: lambda: x.shape[0],
            "parameters": lambda: part_layout(self.problem, self.params).size,
            "outputs": lambda: output_sizes(self.problem, snapshot).total,
        }[self.codomain]()
        return x.new_zeros(rows, x.shape[1])

    def lines(self, snapshot: Snapshot) -> list[str]:
        return ["zero"]


LARGE = 2**25
"""Bytes of a product from which its columns travel in parts, each while the next is computed."""
FEWEST = 8
"""Columns of a part: fewer are computed less well together."""


def _parts(x: Tensor) -> Sequence[Tensor]:
    """Columns that are multiplied and sent together."""
    if x.nbytes < LARGE or x.shape[1] < 2 * FEWEST:
        return (x,)
    parts: Sequence[Tensor] = x.split(max(FEWEST, x.shape[1] * LARGE // (2 * x.nbytes)), 1)
    return parts


@dataclass(frozen=True)
class SharedPlan(Plan):
    """The sum over processes of a plan that is a sum over data; one exchange a product.

    Args:
        own: the plan on the data of this process.
        problem: whose processes these are.
    """

    own: Plan
    problem: Problem

    @property
    def inner(self) -> tuple[Plan, ...]:
        return (self.own,)

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        group = self.problem.group
        with snapshot.lock:  # exchanges of one thread at a time
            group.multiplying(x)
            if len(parts := _parts(x)) == 1:
                return self._summed(self.own.apply(snapshot, x))
            made = (self._wide(self.own.apply(snapshot, part)) for part in parts)
            return torch.cat(group.sums(made), 1).to(x.dtype)

    def dense(self, snapshot: Snapshot) -> Tensor | None:
        with snapshot.lock:
            found = self.own.dense(snapshot)
            return self._summed(found) if self.problem.group.every(found is not None) and found is not None else None

    def _wide(self, own: Tensor) -> Tensor:
        return own if self.problem.accumulate is None else own.to(self.problem.accumulate)

    def _summed(self, own: Tensor) -> Tensor:
        return self.problem.group.sum(self._wide(own)).to(own.dtype)

    def reads(self, snapshot: Snapshot, columns: int) -> Reads | str:
        return "since processes exchange what they computed"

    def lines(self, snapshot: Snapshot) -> list[str]:
        group = self.problem.group
        head = f"sum over {group.size} processes, one exchange a product; on rank {group.rank}:"
        return [head, *indent(self.own.lines(snapshot))]


def shared(plan: Plan, problem: Problem) -> Plan:
    """A plan that is a sum over data, over the data of all processes; gradients of sharded parameters are such sums already."""
    return plan if problem.group.alone or problem.group.sharded else SharedPlan(plan, problem)


def own_part(plan: Plan) -> Plan:
    """The part of a plan that is of the data of this process."""
    return plan.own if isinstance(plan, SharedPlan) else plan


def blocks_of(plan: BlocksPlan, problem: Problem) -> Plan:
    """Blocks that are all sums over data, by one exchange."""
    if problem.group.alone or not all(isinstance(part, SharedPlan) for part in plan.inner):
        return plan
    return shared(BlocksPlan(tuple((rows, own_part(part), label) for rows, part, label in plan.blocks)), problem)

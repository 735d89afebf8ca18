"""Matrices made of layers where parameters lie in parts: each process holds the blocks of the layers that it owns."""

from __future__ import annotations

from dataclasses import dataclass

import curvalg.expr as alg
from curvalg.distributed.group import Group
from curvalg.expr import Expr, Facts
from curvalg.expr.facts import LossFacts
from curvalg.expr.term import MatrixTerm, NamedExpr
from curvalg.problem import Problem, Snapshot
from curvalg.problem.model.sharded.owned_layers import OwnedLayers, OwnedModel
from curvalg.problem.model.sharded.sharded_model import ShardedModel


@dataclass(frozen=True)
class Ownership:
    """The layers of all processes, and the problem that the matrices of this one's are on.

    Args:
        layers: of all processes.
        on: the problem over the layers of this process, which needs no other process; None: it owns none.
    """

    layers: OwnedLayers
    on: Problem | None


def ownership(problem: Problem, snapshot: Snapshot) -> Ownership:
    """Who owns which layer; the same at all states, and kept at each with the matrices.

    Args:
        problem: whose parameters lie in parts.
        snapshot: the state.
    """
    return problem.cached(snapshot).get("ownership", None, lambda: _made(problem, snapshot))


def _made(problem: Problem, snapshot: Snapshot) -> Ownership:
    model, group = problem.model, problem.group
    assert isinstance(model, ShardedModel)
    pieces = {name: model.pieces[name] for name in model.chosen}
    layers = OwnedLayers(pieces, problem.dtype, group.rank, group.size)
    if not layers.own:
        return Ownership(layers, None)
    # A state of its own: sub-problems over some of its parameters are not those of the problem in parts.
    on = problem.over(OwnedModel(layers, model), snapshot.on(snapshot.structure, snapshot.lock))
    on.group, on.whole, on.verify = Group(), None, on.compares
    return Ownership(layers, on)


class OwnedMatrix(NamedExpr):
    """What a matrix term became where parameters lie in parts; equal for equal terms, with the same facts on all processes.

    Args:
        term: the term.
        own: the matrix over the layers of this process; None: it owns none.
        place: who owns which layer.
    """

    def __init__(self, term: MatrixTerm, own: Expr | None, place: Ownership) -> None:
        self.term, self.own, self.place = term, own, place

    @property
    def label(self) -> str:
        return self.term.label

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OwnedMatrix) and other.term == self.term

    def __hash__(self) -> int:
        return hash((OwnedMatrix, self.term))

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return self.term.facts(loss)


_LAYERWISE = (alg.Sum, alg.Product, alg.Inverse, alg.SquareRoot, alg.Transpose)
"""What of block-diagonal matrices over layers is one again."""


def is_layerwise(expr: Expr) -> bool:
    """Whether an expression is made of matrices of layers, bound or not, so that each owner can have its part of it."""
    nodes = list(expr.walk())
    fit = all(
        isinstance(node, (*_LAYERWISE, MatrixTerm, OwnedMatrix, alg.IdentityExpr, alg.ZeroExpr)) for node in nodes
    )
    return fit and any(isinstance(node, (MatrixTerm, OwnedMatrix)) for node in nodes)


def own_part(expr: Expr) -> tuple[Expr | None, Ownership]:
    """The part of a layerwise expression, all of it bound, that is of the layers of this process; and who owns which layer."""
    place = next(node.place for node in expr.walk() if isinstance(node, OwnedMatrix))
    return (None if place.on is None else _replaced(expr)), place


def _replaced(expr: Expr) -> Expr:
    if isinstance(expr, OwnedMatrix):
        assert expr.own is not None
        return expr.own
    return expr.rebuild(tuple(_replaced(part) for part in expr.children)) if expr.children else expr

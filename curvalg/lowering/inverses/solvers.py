"""The solvers of an inverse, tried in order; each accepts with its cost, or says why it declines.

Laws are exact and always apply; solvers are numerical choices: the structured forms first, then products alone. Names and order
are those of :data:`curvalg.expr.SOLVERS`. A newcomer is one name there and one function here under :func:`solver` (or, where it
gives square roots and traces as well, in :mod:`curvalg.lowering.inverses.forms`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from curvalg.errors import FactsError
from curvalg.expr import SOLVERS, Inverse, ZeroExpr
from curvalg.lowering.blocks.rows import RowRanges
from curvalg.lowering.inverses.forms import FORMS, matrix_blocks
from curvalg.lowering.inverses.offer import Form
from curvalg.lowering.inverses.solver import InverseRequest, Solver
from curvalg.lowering.inverses.solver_kinds.blockwise import ByBlocks
from curvalg.lowering.inverses.solver_kinds.few_solves import SMALL, FewSolves
from curvalg.lowering.inverses.solver_kinds.iterative import Iterative
from curvalg.lowering.inverses.solver_kinds.structured import Structured
from curvalg.lowering.lines import indent
from curvalg.solve import cg, minres

Strategy = Callable[[InverseRequest], Solver[Any] | str]
_OWN: dict[str, Strategy] = {}


def solver(name: str) -> Callable[[Strategy], Strategy]:
    """Register a function as the solver of the given name; a form of the same name gives way to it."""

    def register(strategy: Strategy) -> Strategy:
        _OWN[name] = strategy
        return strategy

    return register


def _by_form(name: str) -> Strategy:
    def strategy(request: InverseRequest) -> Solver[Any] | str:
        offer = FORMS[name](request.matrix)
        if not isinstance(offer, Form):
            return offer
        if offer.singular is not None:
            raise FactsError(f"{request.node.expr} has no inverse: {offer.singular}; add damping, c * Identity")
        exact = Structured(request, offer)
        few = offer.rows >= SMALL and FewSolves.fits(request, exact)
        return FewSolves(request, exact) if few else exact

    return strategy


@solver("blocks")  # unlike the form, also where a block needs an iterative solver
def _blocks(request: InverseRequest) -> Solver[Any] | str:
    blocks = matrix_blocks(request.matrix)
    if isinstance(blocks, str):
        return blocks
    options = {**request.node.options, "solver": "auto", "preconditioner": None}
    # ‖r‖ ≤ atol over all blocks where each keeps its part.
    options["atol"] = request.node.atol / len(blocks) ** 0.5
    parts: list[tuple[RowRanges, str, Solver[Any], list[str]]] = []
    for places, block, label in blocks:
        if isinstance(block.expr, ZeroExpr):
            raise FactsError(
                f"the blocks leave out {label}, where the matrix is zero, so it has no inverse; add damping, c * Identity"
            )
        node = Inverse(block.expr, **options)
        own, chain = choose(replace(request, node=node, matrix=block, preconditioner=None))
        parts.append((places, label, own, chain))
    together = ByBlocks(request, parts)
    if together.iterative and request.preconditioner is not None:
        return "a block needs an iterative solver, and the preconditioner is for the whole matrix"
    return together


@solver("cg")
def _cg(request: InverseRequest) -> Solver[Any] | str:
    forced = request.node.solver == "cg" and request.facts.symmetric is not False
    if forced or request.facts.positive_definite:
        return Iterative(request, "cg", cg)
    return f"positive definiteness is {_tri(request.facts.positive_definite)}"


@solver("minres")
def _minres(request: InverseRequest) -> Solver[Any] | str:
    if request.facts.symmetric or (request.node.solver == "minres" and request.facts.symmetric is None):
        return Iterative(request, "minres", minres)
    return f"symmetry is {_tri(request.facts.symmetric)}"


def _tri(value: bool | None) -> str:
    return {True: "proved", False: "refuted", None: "not proved"}[value]


OF_PARTS = ("diagonal", "cg", "minres")
"""Solvers that need no whole matrix, nor a part of it that another process has."""
STRATEGIES: dict[str, Strategy] = {name: _OWN.get(name) or _by_form(name) for name in SOLVERS[1:]}
"""All solvers, in the order in which they are tried."""


def choose(request: InverseRequest) -> tuple[Solver[Any], list[str]]:
    """The first solver that accepts, and a line for each one tried.

    Raises:
        FactsError: none accepts; says which fact is missing.
    """
    asked = request.node.solver
    chain: list[str] = []
    request = replace(request, matrix=request.matrix.localised())
    for name, strategy in STRATEGIES.items():
        if asked not in ("auto", name):
            continue
        if request.matrix.problem.group.sharded and name not in OF_PARTS:
            chain.append(f"{name}: declined, each process has a part of the parameters")
            continue
        outcome = strategy(request)
        if isinstance(outcome, Solver):
            return outcome, [*chain, f"{name}: chosen, {outcome.cost}", *indent(outcome.lines)]
        chain.append(f"{name}: declined, {outcome}")
    cure = (
        "a positive term and damping (+ c * Identity) make a matrix positive definite; block_diagonal() or restrict() make "
        "it smaller"
    )
    if asked != "auto":
        cure = "leave out solver=, or name another"
    raise FactsError(f"no solver for inverse({request.node.expr}): {'; '.join(chain)}. To go on: {cure}")

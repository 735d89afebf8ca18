"""What arrays were computed from, and how that differs from a problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from curvalg.expr import Expr
from curvalg.expr.nodes.arrays import ArrayLeaf
from curvalg.problem import Problem, Snapshot
from curvalg.runs.checkpoint import differences
from curvalg.runs.run_identity import state_identity
from curvalg.runs.sealed import library_version

ORIGIN = "identity of the state"
"""What is kept with a leaf of a bound expression."""


def identity(problem: Problem, snapshot: Snapshot) -> dict[str, Any]:
    """What identifies a problem at a state, by words, with the versions of the libraries whose arithmetic matters."""
    return {
        **state_identity(problem, snapshot),
        "version of curvalg": library_version(),
        "version of torch": str(torch.__version__),
    }


def origins(expr: Expr) -> list[dict[str, Any]]:
    """The identities of the states at which the arrays of an expression were computed, each once."""
    found: list[dict[str, Any]] = []
    for node in expr.walk():
        if isinstance(node, ArrayLeaf) and (known := node.known.get(ORIGIN)) is not None and known not in found:
            found.append(known)
    return found


def remember(expr: Expr, identity: Mapping[str, Any]) -> None:
    """Keep an identity with the arrays of an expression that have none yet."""
    for node in expr.walk():
        if isinstance(node, ArrayLeaf):
            node.known.setdefault(ORIGIN, dict(identity))


def changed(stored: Sequence[Mapping[str, Any]], problem: Problem) -> list[str]:
    """What a problem at its present state differs in from all of some identities: lines, from the most similar one."""
    here = identity(problem, problem.snapshot())
    return min((list(differences(there, here)) for there in stored), key=len, default=[])

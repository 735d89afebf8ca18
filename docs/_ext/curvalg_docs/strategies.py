"""The table of strategies for an inverse, asked from the code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from curvalg import (
    CurvalgError,
    Diagonal,
    Eigenbasis,
    Expr,
    Identity,
    Kronecker,
    LowRank,
    Problem,
    block_diagonal,
    inverse,
    registry,
)
from curvalg.expr.inverses import SOLVERS
from curvalg.lowering.strategies import STRATEGIES

SIZE = 8
"""Parameters of the small problem that the examples are for: a weight 2 x 3 and a bias."""


@dataclass(frozen=True)
class Example:
    """One expression that a strategy takes.

    Args:
        shown: how it is written.
        build: makes the matrix that is inverted.
        when: the condition, in words.
    """

    shown: str
    build: Callable[[], Expr]
    when: str


def _orthogonal(n: int) -> torch.Tensor:
    return torch.linalg.qr(torch.arange(1.0, n * n + 1).reshape(n, n) + 3 * torch.eye(n))[0]


def _ggn() -> Expr:
    return registry.build("ggn")


EXAMPLES: dict[str, Example] = {
    "diagonal": Example(
        "Diagonal(d) + c*Identity", lambda: Diagonal(torch.arange(1.0, SIZE + 1)) + 0.1 * Identity, "diagonals and the identity"
    ),
    "kronecker": Example(
        "Kronecker(B, A) + c*Identity",
        lambda: Kronecker(torch.eye(2) + 1, 2 * torch.eye(4) + 1) + 0.1 * Identity,
        "one Kronecker product; symmetric factors if damped",
    ),
    "eigenbasis": Example(
        "Eigenbasis(Q, d) + c*Identity",
        lambda: Eigenbasis(_orthogonal(SIZE), torch.arange(1.0, SIZE + 1)) + 0.1 * Identity,
        "one matrix that is given by its eigenvectors, as EKFAC",
    ),
    "blocks": Example(
        "block_diagonal(ggn, by='parameter') + c*Identity",
        lambda: block_diagonal(_ggn()) + 0.1 * Identity,
        "blocks that cover all parameters; each has a strategy of its own",
    ),
    "woodbury": Example(
        "LowRank(U) + Diagonal(d)",
        lambda: LowRank(torch.ones(SIZE, 1)) + Diagonal(torch.arange(1.0, SIZE + 1)),
        "low-rank updates of a matrix that has a structured inverse",
    ),
    "dual": Example(
        "ggn + c*Identity",
        lambda: _ggn() + 0.1 * Identity,
        "a positive sum of terms V Vᵀ with fewer columns than parameters",
    ),
    "kernel": Example(
        "jacobian @ jacobian.T + c*Identity",
        lambda: registry.build("ntk") + 0.1 * Identity,
        "the neural tangent kernel",
    ),
    "function": Example(
        "inverse(Diagonal(d)) + c*Identity",
        lambda: inverse(Kronecker(torch.eye(2) + 1, 2 * torch.eye(4) + 1)) + 0.1 * Identity,
        "an inverse or a square root of a structured matrix",
    ),
    "dense": Example("hessian + c*Identity", lambda: registry.build("hessian") + Identity, "any matrix of at most 4096 rows"),
    "cg": Example("ggn + c*Identity", lambda: _ggn() + 0.1 * Identity, "positive definiteness is proved"),
    "minres": Example("hessian + c*Identity", lambda: registry.build("hessian") + Identity, "symmetry is proved"),
}
"""For each strategy a matrix that it takes; a test compares the names with the code's table."""


def problem() -> Problem:
    """The small problem of the examples: eight parameters, three samples."""
    torch.manual_seed(0)
    return Problem(nn.Linear(3, 2), nn.CrossEntropyLoss(), (torch.randn(3, 3), torch.tensor([0, 1, 1])))


def _inverse(matrix: Expr, name: str) -> Expr:
    """The inverse by one strategy; a strategy that cannot be asked for by name comes from the whole chain."""
    return inverse(matrix, solver=name if name in SOLVERS else "auto")  # type: ignore[arg-type]


def accepted(name: str, on: Problem) -> str:
    """What a strategy says of its costs for its example.

    Raises:
        CurvalgError: it declines.
    """
    text = _inverse(EXAMPLES[name].build(), name).lower(on).explain()
    (line,) = (line for line in text.splitlines() if line.strip().startswith(f"{name}: chosen, "))
    return line.strip().removeprefix(f"{name}: chosen, ")


def declined(name: str, on: Problem) -> str:
    """Why a strategy declines the first other example that it does not take; empty where it takes all."""
    for other, example in EXAMPLES.items():
        if other == name:
            continue
        try:
            _inverse(example.build(), name).lower(on)
        except CurvalgError as error:
            _, found, reason = str(error).partition(f"{name}: declined, ")
            if found:
                return f"`{example.shown}`: {reason.partition('. A positive term')[0]}"
    return ""


def strategy_table() -> str:
    """All strategies in the order in which they are tried, as Markdown, with what they say of themselves."""
    on = problem()
    lines = ["| | strategy | takes | for example | its cost there | declines, for example |", "|---|---|---|---|---|---|"]
    for number, name in enumerate(STRATEGIES, 1):
        example = EXAMPLES[name]
        cells = [
            str(number),
            f"`{name}`",
            example.when,
            f"`{example.shown}`",
            accepted(name, on),
            declined(name, on),
        ]
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"

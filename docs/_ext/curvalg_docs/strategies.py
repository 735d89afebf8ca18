"""The table of strategies for an inverse, asked from the code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from curvalg import (
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
from curvalg.expr.nodes.inverse import SOLVERS
from curvalg.lowering.inverses.solvers import STRATEGIES

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
    basis: torch.Tensor = torch.linalg.qr(torch.arange(1.0, n * n + 1).reshape(n, n) + 3 * torch.eye(n))[0]
    return basis


def _ggn() -> Expr:
    return registry.build("ggn")


EXAMPLES: dict[str, Example] = {
    "diagonal": Example(
        "Diagonal(d) + c*Identity",
        lambda: Diagonal(torch.arange(1.0, SIZE + 1)) + 0.1 * Identity,
        "diagonals and the identity",
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
    "gram": Example(
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
        "inverse(Kronecker(B, A)) + c*Identity",
        lambda: inverse(Kronecker(torch.eye(2) + 1, 2 * torch.eye(4) + 1)) + 0.1 * Identity,
        "an inverse or a square root of a structured matrix",
    ),
    "dense": Example(
        "hessian + c*Identity", lambda: registry.build("hessian") + Identity, "any matrix of at most 4096 rows"
    ),
    "cg": Example("ggn + c*Identity", lambda: _ggn() + 0.1 * Identity, "any matrix that is proved positive definite"),
    "minres": Example(
        "hessian + c*Identity", lambda: registry.build("hessian") + Identity, "any matrix that is proved symmetric"
    ),
}
"""For each strategy a matrix that it takes; a test compares the names with the code's table."""


def problem() -> Problem:
    """The small problem of the examples: eight parameters, three samples."""
    torch.manual_seed(0)
    return Problem(nn.Linear(3, 2), nn.CrossEntropyLoss(), (torch.randn(3, 3), torch.tensor([0, 1, 1])))


def _inverse(matrix: Expr, name: str) -> Expr:
    """The inverse by one strategy; a strategy that cannot be asked for by name comes from the whole chain."""
    return inverse(matrix, solver=name if name in SOLVERS else "auto")


def accepted(name: str, on: Problem) -> str:
    """What a strategy says of its costs for its example.

    Raises:
        FactsError: it declines.
    """
    text = _inverse(EXAMPLES[name].build(), name).lower(on).explain()
    (line,) = (line for line in text.splitlines() if line.strip().startswith(f"{name}: chosen, "))
    return line.strip().removeprefix(f"{name}: chosen, ")


def refusals() -> dict[str, str]:
    """Why each strategy but the last declines the damped Hessian of a linear model with more rows than are factorised."""
    model = nn.Linear(1500, 3)
    large = Problem(model, nn.CrossEntropyLoss(), (torch.ones(2, 1500), torch.tensor([0, 1])))
    text = inverse(registry.build("hessian") + Identity).lower(large).explain()
    found = (line.strip().partition(": declined, ") for line in text.splitlines())
    return {name: reason for name, _, reason in found if reason}


def strategy_table() -> str:
    """All strategies in the order in which they are tried, as Markdown, with what they say of themselves."""
    on, refused = problem(), refusals()
    lines: list[str] = []
    for number, name in enumerate(STRATEGIES, 1):
        example = EXAMPLES[name]
        by_name = f'`solver="{name}"`' if name in SOLVERS else "not by name"
        lines += [
            f"## {number}. {name}",
            "",
            f"Takes {example.when}.",
            "",
            f"- Example: `{example.shown}`",
            f"- Cost there: {accepted(name, on)}",
            f"- Asked for: {by_name}",
        ]
        if name in refused:
            lines.append(f"- Declines a large Hessian: {refused[name]}")
        lines.append("")
    return "\n".join(lines)

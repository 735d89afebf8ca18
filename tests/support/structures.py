"""Structured matrices over the parameters of the "mlp" case, each with its dense value from arrays alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvalg import Block, Diagonal, Eigenbasis, Expr, Kronecker, LowRank, MatrixTerm, block_diagonal, registry

Structured = Callable[[Any], tuple[Expr, Tensor]]
"""dense reference of the case -> (expression, its matrix)."""


def random(*shape: int, seed: int = 0) -> Tensor:
    """Fixed float64 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def psd(n: int, seed: int = 0) -> Tensor:
    """A well-conditioned positive definite matrix."""
    half = random(n, n, seed=seed)
    return half @ half.T / n + 0.1 * torch.eye(n).double()


def symmetric(n: int, seed: int = 0) -> Tensor:
    """An indefinite matrix."""
    half = random(n, n, seed=seed)
    return half + half.T


def orthogonal(n: int, seed: int = 0) -> Tensor:
    """Q of a QR factorisation."""
    return torch.linalg.qr(random(n, n, seed=seed))[0]


def joint_positions(layout: Any, weight: str, bias: str) -> list[int]:
    """Flat positions of [W | b], row by row, written down the slow way."""
    rows, columns = layout[weight][1]
    at, b = layout[weight][0], layout[bias][0]
    return [i for row in range(rows) for i in [*range(at + row * columns, at + (row + 1) * columns), b + row]]


def offsets(dense: Any) -> dict[str, tuple[int, tuple[int, ...]]]:
    """name -> (flat offset, shape)."""
    at, result = 0, {}
    for name, shape in zip(dense.names, dense.shapes, strict=True):
        result[name] = (at, tuple(shape))
        at += shape.numel()
    return result


def embed(n: int, positions: Any, matrix: Tensor) -> Tensor:
    """A matrix at the given rows and columns of an n x n zero."""
    result = torch.zeros(n, n, dtype=matrix.dtype)
    index = torch.as_tensor(positions)
    result[index[:, None], index[None]] = matrix
    return result


@dataclass(frozen=True)
class JointKronecker(MatrixTerm):
    """Fixed Kronecker factors for every layer in the joint [W | b] layout, as a Kronecker approximation finishes."""

    def accumulate(self, batch: Any, prepared: Any = None) -> Tensor:
        return torch.zeros(())

    def finish(self, stats: Any, layout: Any, prepared: Any = None) -> Expr:
        blocks = []
        for name in layout.names:
            if name.endswith("weight"):
                rows, columns = layout.shapes[name]
                bias = name.replace("weight", "bias")
                blocks.append(Block((name, bias), Kronecker(psd(rows, 3), psd(columns + 1, 4)), joint=True))
        return block_diagonal(blocks)


def joint_kronecker(dense: Any) -> Tensor:
    """The matrix of :class:`JointKronecker`."""
    table = offsets(dense)
    total = torch.zeros(dense.D, dense.D).double()
    for name, (_, shape) in table.items():
        if name.endswith("weight"):
            bias = name.replace("weight", "bias")
            block = torch.kron(psd(shape[0], 3), psd(shape[1] + 1, 4))
            total += embed(dense.D, joint_positions(table, name, bias), block)
    return total


def diagonal(dense: Any) -> tuple[Expr, Tensor]:
    values = random(dense.D, seed=5).abs() + 0.1
    return Diagonal(values), torch.diag(values)


def kronecker(dense: Any) -> tuple[Expr, Tensor]:
    # 43 is prime: the factors are 1 and D.
    a, b = psd(1, 1), symmetric(dense.D, 2)
    return Kronecker(a, b), torch.kron(a, b)


def eigenbasis(dense: Any) -> tuple[Expr, Tensor]:
    q, values = orthogonal(dense.D), random(dense.D, seed=6).abs()
    return Eigenbasis(q, values), q @ torch.diag(values) @ q.T


def eigenbasis_kronecker(dense: Any) -> tuple[Expr, Tensor]:
    a, b = torch.eye(1).double(), orthogonal(dense.D)
    values = random(dense.D, seed=6).abs()
    q = torch.kron(a, b)
    return Eigenbasis(Kronecker(a, b), values), q @ torch.diag(values) @ q.T


def low_rank(dense: Any) -> tuple[Expr, Tensor]:
    left, core = random(dense.D, 4), symmetric(4, 7) + 8 * torch.eye(4)
    return LowRank(left, core), left @ core @ left.T


def low_rank_on_diagonal(dense: Any) -> tuple[Expr, Tensor]:
    (a, A), (b, B) = low_rank(dense), diagonal(dense)
    return 2 * a + b, 2 * A + B


def joint_blocks(dense: Any) -> tuple[Expr, Tensor]:
    return JointKronecker(), joint_kronecker(dense)


def mixed_blocks(dense: Any) -> tuple[Expr, Tensor]:
    table = offsets(dense)
    first = [n for n in table if n.startswith("0.")]
    rest = [n for n in table if not n.startswith("0.")]

    def positions(names: list[str]) -> list[int]:
        return [i for n in names for i in range(table[n][0], table[n][0] + torch.Size(table[n][1]).numel())]

    at, rest_at = torch.tensor(positions(first)), torch.tensor(positions(rest))
    values = random(len(rest_at), seed=8).abs() + 0.2
    expr = block_diagonal({"0.*": registry.build("ggn"), "[!0].*": Diagonal(values)})
    matrix = embed(dense.D, at, dense.ggn[at[:, None], at[None]]) + embed(dense.D, rest_at, torch.diag(values))
    return expr, matrix


def term(name: str) -> Structured:
    def build(dense: Any) -> tuple[Expr, Tensor]:
        return registry.build(name), dense.matrix(name)

    return build


def sum_of_terms(dense: Any) -> tuple[Expr, Tensor]:
    expr = registry.build("ggn") / 2 + 3 * registry.build("centered_covariance")
    return expr, dense.ggn / 2 + 3 * dense.centered_covariance


STRUCTURED: dict[str, tuple[Structured, str]] = {
    "diagonal": (diagonal, "diagonal"),
    "kronecker": (kronecker, "kronecker"),
    "eigenbasis": (eigenbasis, "eigenbasis"),
    "eigenbasis of Kronecker factors": (eigenbasis_kronecker, "eigenbasis"),
    "low rank": (low_rank, "woodbury"),
    "low rank on a diagonal": (low_rank_on_diagonal, "woodbury"),
    "joint Kronecker blocks": (joint_blocks, "blocks"),
    "mixed blocks": (mixed_blocks, "blocks"),
    "ggn": (term("ggn"), "gram"),
    "covariance": (term("covariance"), "gram"),
    "centered covariance": (term("centered_covariance"), "gram"),
    "sum of terms": (sum_of_terms, "gram"),
}
"""name -> (expression and matrix, the form that it takes once damped)."""

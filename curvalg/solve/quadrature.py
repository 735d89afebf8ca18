"""Lanczos recurrences of several vectors at once, and the Gauss quadrature rules that they are.

Each starting vector q has a recurrence of its own, A V = V T + β v eᵀ with V e₁ = q, but all are advanced by one product with
as many columns. The eigenvalues θ of T with the squared first components τ² of its eigenvectors are the Gauss rule of the
measure that A and q define, qᵀ f(A) q ≈ Σ τ² f(θ). Source: Golub and Meurant, Matrices, Moments and Quadrature (2010).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from scipy.special import stdtrit
from torch import Tensor

from curvalg.solve.orthogonal import grown
from curvalg.solve.powers import exponents, scaled
from curvalg.solve.solve_result import Matmul
from curvalg.tensors.memory import small, smalls
from curvalg.tensors.spaces import Summand, VectorSpace
from curvalg.tensors.spaces.vector_space import space_of

COARSE = 0.5
"""Share of the steps whose rule a rule is compared with, for an estimate of its error."""
CACHED = 2**19
"""Numbers of the rows that are worked on together, few enough for the processor's cache."""


@dataclass(frozen=True)
class Recurrences:
    """Lanczos recurrences of p vectors after j steps.

    Args:
        basis: rows ((j + 1) p, n), those of one step together; the last two steps only, where not all are kept.
        alphas: diagonals of the tridiagonal matrices, float64 on the CPU, (j, p).
        betas: norms of what was left after each step, (j, p); zero from where a recurrence ended, which is exact there.
        whole: whether the basis is kept, and each vector orthogonalised against all of its own.
        capacity: steps that there should be room for.
        space: that the rows are in.
    """

    basis: Tensor
    alphas: Tensor
    betas: Tensor
    whole: bool
    capacity: int
    space: VectorSpace

    @property
    def steps(self) -> int:
        """The number j of steps that were made."""
        return len(self.alphas)

    @property
    def width(self) -> int:
        """The number p of recurrences."""
        return self.alphas.shape[1]

    @property
    def going(self) -> Tensor:
        """The mask (p,) of recurrences that have not ended."""
        return self.betas[-1] > 0 if self.steps else torch.ones(self.width, dtype=torch.bool, device="cpu")

    def vectors(self) -> Tensor:
        """The vectors V of each recurrence that is kept whole, (p, j, n), a view."""
        return self.held().transpose(0, 1)[:, : self.steps]

    def held(self) -> Tensor:
        """The rows that are held, those of one step together, (steps, p, n), a view."""
        rows, n = self.basis.shape
        return self.basis.view(rows // self.width, self.width, n)


def begin(start: Tensor, *, whole: bool, capacity: int, space: VectorSpace | None = None) -> Recurrences:
    """The recurrences that begin at unit rows (p, n) of a space, which are whole by default."""
    none = torch.zeros(0, len(start), dtype=torch.float64, device="cpu")
    return Recurrences(start.contiguous(), none, none, whole, capacity, space_of(start, space))


def advance(old: Recurrences, matmul: Matmul) -> Recurrences:
    """Make one step of all recurrences that have not ended, by one product with their columns."""
    p, going = old.width, old.going
    current, previous = old.basis[-p:], old.basis[-2 * p : -p]
    product = _product(current, going, matmul)
    both = None if old.whole else torch.empty(2 * p, current.shape[1], dtype=current.dtype, device=current.device)
    out = torch.empty_like(current) if both is None else both[p:]
    rest, diagonal, norms = _three_term(product, current, previous, old, out)
    if old.whole:
        vectors = old.held().transpose(0, 1)
        rest, diagonal, beta = _purged(rest, vectors, diagonal, norms, old.space)
    else:
        diagonal, beta = smalls(diagonal, *old.space.joined(norms))
    # Diagonals of ended recurrences stay within the spectrum: nothing couples to them, but functions are evaluated there.
    alpha = torch.where(going, diagonal, old.alphas[0] if old.steps else 0.0)
    scale = torch.cat([old.alphas, old.betas, alpha[None]]).abs().amax(0)
    beta = torch.where(going & (beta > 10 * torch.finfo(rest.dtype).eps * scale), beta, 0.0)
    rest.mul_(_column(torch.where(beta > 0, 1 / beta, 0.0), rest))
    if both is None:
        kept = grown(old.basis, rest, old.capacity * p)
    else:
        both[:p], kept = current, both
    return replace(
        old, basis=kept, alphas=torch.cat([old.alphas, alpha[None]]), betas=torch.cat([old.betas, beta[None]])
    )


def gauss(alphas: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the rules of j steps, by Golub and Welsch (1969).

    Args:
        alphas: (j, p) with j ≥ 1.
        betas: (j, p); the last row plays no part.

    Returns:
        nodes ascending and weights, each (p, j); weights sum to 1 in each row.
    """
    values, vectors = torch.linalg.eigh(_tridiagonal(alphas, betas))
    weights = vectors[:, 0, :].square()
    return values, weights / weights.sum(1, keepdim=True)


def first_column(alphas: Tensor, betas: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The vector f(T) e₁ of each recurrence, (p, j)."""
    values, vectors = torch.linalg.eigh(_tridiagonal(alphas, betas))
    return torch.einsum("pij,pj->pi", vectors, function(values) * vectors[:, 0, :])


@dataclass(frozen=True)
class GaussRules:
    """Gauss rules of several random vectors, with those of fewer steps to compare with.

    Args:
        nodes, weights: (p, j), float64 on the CPU; weights sum to 1 in each row.
        coarse: nodes and weights of half the steps; NaN where there is only one, and it is not exact.
    """

    nodes: Tensor
    weights: Tensor
    coarse: tuple[Tensor, Tensor]

    def mean(self, function: Callable[[Tensor], Tensor]) -> tuple[float, float, float]:
        """The mean E qᵀ f(A) q as (value, standard error over the vectors, estimated error of the quadrature).

        The standard error of a single vector is NaN. The quadrature is compared with that of fewer steps.
        """
        each = (self.weights * function(self.nodes)).sum(1)
        fewer = (self.coarse[1] * function(self.coarse[0])).sum(1)
        value, error = float(each.mean()), float(standard_error(each))
        return value, error, abs(value - float(fewer.mean()))


def rule(alphas: Tensor, betas: Tensor) -> GaussRules:
    """The rules of tridiagonal matrices, (j, p) each with j ≥ 1."""
    fewer = max(1, int(COARSE * len(alphas)))
    nodes, weights = gauss(alphas[:fewer], betas[:fewer])
    if len(alphas) == 1 and bool(betas.any()):
        weights = torch.full_like(weights, torch.nan)
    return GaussRules(*gauss(alphas, betas), (nodes, weights))


def standard_error(each: Tensor) -> Tensor:
    """The standard error of the mean over the first axis, widened by Student's t so that twice as much covers 95 %.

    The spread of four numbers is itself known to a third. NaN for a single one.
    """
    if len(each) < 2:
        return torch.full_like(each[0], torch.nan)
    widened = float(stdtrit(len(each) - 1, 0.975) / stdtrit(1e9, 0.975))
    rows = each.reshape(len(each), -1)
    unit = exponents(rows)
    error: Tensor = widened * scaled(scaled(rows, -unit).std(0), unit) / len(each) ** 0.5
    return error.reshape(each.shape[1:])


def _tridiagonal(alphas: Tensor, betas: Tensor) -> Tensor:
    """The tridiagonal matrices, (p, j, j)."""
    beside = betas[: len(alphas) - 1].T
    return torch.diag_embed(alphas.T) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)


def _product(rows: Tensor, going: Tensor, matmul: Matmul) -> Tensor:
    """The product of A with the rows that are multiplied, zeros for the others."""
    if bool(going.all()):
        return matmul(rows.T).T.contiguous()
    full, at = torch.zeros_like(rows), going.nonzero().reshape(-1).to(rows.device, non_blocking=True)
    full[at] = matmul(rows[at].T).T
    return full


def _three_term(
    product: Tensor, current: Tensor, previous: Tensor, old: Recurrences, out: Tensor
) -> tuple[Tensor, Tensor, Summand]:
    """The rows A v − α v − β v₋₁, written to ``out``, since products may return something they keep; α; what norms are made of.

    The numbers stay on their device.
    """
    space = old.space
    alphas: list[Tensor] = []
    norms: list[Summand] = []
    # Between processes all rows at once: of groups each takes an exchange of its own.
    group = max(1, CACHED // current.shape[1]) if space.whole else len(current)
    for some in range(0, len(current), group):
        rows = slice(some, some + group)
        alpha = space.dots(current[rows], product[rows], 1)
        rest = torch.addcmul(product[rows], alpha[:, None], current[rows], value=-1, out=out[rows])
        if old.steps:
            rest.addcmul_(_column(old.betas[-1, rows], rest), previous[rows], value=-1)
        alphas.append(alpha)
        norms.append(space.squares_part(rest))
    return out, torch.cat(alphas), Summand(torch.cat([norm.here for norm in norms]), norms[0].finish)


def _purged(
    rest: Tensor, vectors: Tensor, diagonal: Tensor, norms: Summand, space: VectorSpace
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows without their parts along the vectors (p, j, n), twice where the first pass took much away; α; the norms.

    What came on a device is read with what the decision needs, by one wait for it.
    """
    rest, former = _less(rest, vectors, space, norms)
    diagonal, before, after = smalls(diagonal, former, *space.joined(space.squares_part(rest)))
    if bool((after >= 0.7 * before).all()):
        return rest, diagonal, after
    rest, _ = _less(rest, vectors, space, norms)
    return rest, diagonal, small(*space.joined(space.squares_part(rest)))


def _less(rest: Tensor, vectors: Tensor, space: VectorSpace, norms: Summand) -> tuple[Tensor, Tensor]:
    """The rows without their parts along the vectors (p, j, n), and the norms, whose sum travels with these parts."""
    coefficients, found = space.joined(Summand(torch.bmm(vectors, space.weighed(rest)[:, :, None])), norms)
    return torch.baddbmm(rest[:, None, :], coefficients.transpose(1, 2), vectors, alpha=-1)[:, 0], found


def _column(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers.to(like.dtype).to(like.device, non_blocking=True)[:, None]

"""Diagonals and Nyström approximations of bound matrices."""

from __future__ import annotations

import warnings
from functools import singledispatch
from typing import TypeAlias

import torch
from torch import Tensor

from curvalg.errors import CurvalgWarning, FactsError
from curvalg.expr import BlockDiagonal, Diagonal, DiagonalEstimate, DiagonalPart, Expr, LowRank, Nystrom, Restriction
from curvalg.expr.affine_form import affine
from curvalg.lowering.blocks.submatrices import block_problem, is_local
from curvalg.lowering.inverses.forms import DENSE_LIMIT, find
from curvalg.lowering.inverses.offer import BoundMatrix
from curvalg.lowering.low_rank.all_columns import columns_of
from curvalg.lowering.low_rank.factored_sum import factored_sum
from curvalg.problem import Problem, Snapshot
from curvalg.tensors.memory import wide, widest
from curvalg.tensors.random_numbers import normals

CHUNK = 256
"""Columns of a product with unit vectors."""

PROBES = 16
"""Columns of a product with random signs."""


Computed: TypeAlias = DiagonalPart | DiagonalEstimate | Nystrom
"""What takes products with the matrix inside to become a leaf."""


@singledispatch
def compute(expr: Expr, matrix: BoundMatrix, snapshot: Snapshot, whole: Problem) -> Diagonal | LowRank:
    """The leaf that an expression becomes, given the matrix inside and the problem of which its own may be a part."""
    raise AssertionError(f"{type(expr).__name__} is not made from products")


@compute.register
def _(expr: DiagonalPart, matrix: BoundMatrix, snapshot: Snapshot, whole: Problem) -> Diagonal:
    """The exact diagonal: by structure, by the columns of Gauss-Newton forms, else by one product a parameter."""
    matrix = matrix.localised()
    values = _by_structure(matrix, snapshot)
    if values is None:
        values = _by_columns(matrix, snapshot)
    return Diagonal(_by_products(matrix, snapshot) if values is None else values)


@compute.register
def _(expr: DiagonalEstimate, matrix: BoundMatrix, snapshot: Snapshot, whole: Problem) -> Diagonal:
    """An estimated diagonal: exact by structure, else the mean of v ∘ A v over random signs v."""
    matrix = matrix.localised()
    if (values := _by_structure(matrix, snapshot)) is not None:
        return Diagonal(values)
    problem, total = (
        matrix.problem,
        torch.zeros(matrix.size, dtype=widest(matrix.problem.device), device=matrix.problem.device),
    )
    # Drawn on the CPU, so that a seed means the same on every device.
    generator = torch.Generator(device="cpu").manual_seed(expr.seed)
    for at in range(0, expr.probes, PROBES):
        bits = torch.randint(0, 2, (matrix.size, min(PROBES, expr.probes - at)), generator=generator, device="cpu")
        signs = (2 * bits - 1).to(problem.dtype).to(problem.device)
        total += (signs * matrix.plan.apply(snapshot, signs)).sum(1)
    return Diagonal((total / expr.probes).to(problem.dtype))


def _by_structure(matrix: BoundMatrix, snapshot: Snapshot) -> Tensor | None:
    form, _ = find(matrix, exclude=("gram", "dense"))
    return None if form is None else form.at(snapshot).diagonal()


def _by_columns(matrix: BoundMatrix, snapshot: Snapshot) -> Tensor | None:
    """Sums of squared per-sample directions; no product."""
    problem, found = matrix.problem, factored_sum(matrix.expr, matrix.problem)
    if isinstance(found, str) or any(term.centred for term in found.terms):
        return None
    weights = {term: c for c, term in found.entries}
    squares: Tensor = columns_of(problem, snapshot, found.terms).squares(problem, snapshot, weights)
    return squares + found.shift


def _by_products(matrix: BoundMatrix, snapshot: Snapshot) -> Tensor:
    n, problem = matrix.size, matrix.problem
    if n > DENSE_LIMIT:
        warnings.warn(
            f"the diagonal of {matrix.expr} takes {n} products, one for each parameter: exact, but slow",
            CurvalgWarning,
            stacklevel=2,
        )
    result = torch.empty(n, dtype=problem.dtype, device=problem.device)
    for at in range(0, n, CHUNK):
        width = min(CHUNK, n - at)
        unit = torch.zeros(n, width, dtype=problem.dtype, device=problem.device)
        chosen = torch.arange(width, device=problem.device)
        unit[at + chosen, chosen] = 1
        result[at : at + width] = matrix.plan.apply(snapshot, unit)[at + chosen, chosen]
    return result


@compute.register
def _(expr: Nystrom, matrix: BoundMatrix, snapshot: Snapshot, whole: Problem) -> LowRank:
    """U Λ Uᵀ = (AΩ)(ΩᵀAΩ)⁺(AΩ)ᵀ by the shifted Cholesky form of Frangella, Tropp and Udell (arXiv 2110.02820, Alg. 2.1).

    Raises:
        FactsError: A turned out not to be positive semi-definite.
    """
    given, matrix = matrix, matrix.localised()
    n, problem = matrix.size, matrix.problem
    rank = min(expr.rank, n)
    omega = torch.linalg.qr(normals((n, rank), expr.seed))[0].to(problem.device, widest(problem.device))
    product = wide(matrix.plan.apply(snapshot, omega.to(problem.dtype)))
    shift = torch.finfo(problem.dtype).eps * float(product.norm())
    triangle = _cholesky(omega, product, shift)
    if triangle is None:
        # What has cancelled, or is zero by symmetry, is as large as the rounding of what it is made of, and has any sign.
        shift = ROUNDING * torch.finfo(problem.dtype).eps * _size_of_parts(given, whole, snapshot)
        if float(product.norm()) <= shift:
            return LowRank(product[:, :1].to(problem.dtype), product.new_zeros(1).to(problem.dtype))
        triangle = _cholesky(omega, product, shift)
    if triangle is None:
        raise FactsError(
            f"{expr.expr} is not positive semi-definite (its projection has a negative eigenvalue), so it has no Nyström "
            "approximation; use the ggn or a covariance"
        )
    half = torch.linalg.solve_triangular(triangle, (product + shift * omega).T, upper=False).T
    left, singular_values, _ = torch.linalg.svd(half, full_matrices=False)
    values = (singular_values.square() - shift).clamp_min(0)
    return LowRank(left.to(problem.dtype), values.to(problem.dtype))


ROUNDING = 32
"""Rounding of a product, in units of the precision and of the size of what the matrix is made of."""


def _cholesky(omega: Tensor, product: Tensor, shift: float) -> Tensor | None:
    """The triangle of Ωᵀ (A + shift · I) Ω; None where that is not positive definite."""
    core = omega.T @ product
    core = (core + core.T) / 2 + shift * torch.eye(core.shape[0], dtype=core.dtype, device=core.device)
    triangle, info = torch.linalg.cholesky_ex(core)
    return None if int(info) else triangle


def _size_of_parts(matrix: BoundMatrix, whole: Problem, snapshot: Snapshot) -> float:
    """About Σ |cᵢ| ‖Aᵢ‖_F of a matrix Σ cᵢ Aᵢ + c I, each over all parameters where it is a part of such a matrix."""
    parts, shift = affine(matrix.expr)
    total = abs(shift)
    for c, part in parts:
        if isinstance(part, BlockDiagonal) and not isinstance(part.what, Expr):
            blocks = [matrix.of(block.expr, block_problem(matrix.problem, block)) for block in part.what]
            total += abs(c) * sum(_size_of_parts(block, whole, snapshot) for block in blocks)
            continue
        inner = part.expr if isinstance(part, Restriction) else part
        one = matrix.of(inner, whole if is_local(inner) else matrix.problem)
        directions = torch.linalg.qr(normals((one.size, min(4, one.size)), 0))[0].to(
            one.problem.device, one.problem.dtype
        )
        size = float(wide(one.plan.apply(snapshot, directions)).norm())
        total += abs(c) * size * (one.size / directions.shape[1]) ** 0.5
    return total

"""The arrays that a matrix is made of, block by block, for those who compute with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import reduce, singledispatch
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from curvalg.errors import ExpressionError
from curvalg.expr import BlockDiagonal, Diagonal, Eigenbasis, Expr, Identity, Kronecker, LowRank
from curvalg.expr.affine_form import affine
from curvalg.lowering.blocks.chosen_entries import part_layout
from curvalg.lowering.blocks.rows import RowRanges
from curvalg.lowering.blocks.submatrices import block_places, block_problem
from curvalg.lowering.inverses import forms
from curvalg.lowering.inverses.offer import BoundMatrix
from curvalg.lowering.matrices import (
    Blocks,
    DenseMatrix,
    KroneckerBasis,
    MatrixBasis,
    Spectral,
    Structure,
    UnitBasis,
)
from curvalg.lowering.matrices.array_leaves import numbers, tensor
from curvalg.problem import Layout, Snapshot

Kind: TypeAlias = Literal["kronecker", "eigenbasis", "diagonal", "low_rank", "dense"]


@dataclass(frozen=True, kw_only=True)
class MatrixBlock:
    """One diagonal block, scale · M + shift · I, of a matrix A: A[rows][:, rows] in the flat layout of the parameters.

    M by ``kind``, for n rows:

    - "kronecker": F₁ ⊗ F₂ ⊗ …, row-major, the output factor first: (F₁ ⊗ F₂) vec(V) = vec(F₁ V F₂ᵀ) for V of the shape
      (outputs, inputs). ``factors`` are square; or stacks (G, m, m) of as many, for G products one below the other.
    - "eigenbasis": Q diag(values) Qᵀ + rest · (I − Q Qᵀ). ``basis`` is Q as Kronecker factors as above, or one matrix (n, r) of
      r ≤ n orthonormal columns; ``values`` (n,) or (r,); ``rest`` counts where r < n.
    - "diagonal": diag(values), values (n,).
    - "low_rank": L C Rᵀ with ``factors`` (L, C, R) of the shapes (n, r), (r, r), (n, r).
    - "dense": ``factors`` (M,), of the shape (n, n).

    Args:
        params: names of the parameters of the block.
        joint: whether its rows are those of [W | b]: all inputs of an output, then its bias; else parameters follow each other.
        kind: what M is.
        rows: places (n,) of the rows of the block among all parameters, in its order.
        factors: of M, empty where it has none.
        basis: of M, empty where it has none.
        values: of M; None where it has none.
        rest: see "eigenbasis".
        scale: the number before M.
        shift: the number before the identity.

    >>> import torch
    >>> from curvalg import Identity, Problem, registry
    >>> data = (torch.randn(9, 4), torch.randint(3, (9,)))
    >>> problem = Problem(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data)
    >>> (block,) = (2 * registry.build("kfac") + 0.1 * Identity).lower(problem).structure
    >>> block.kind, block.joint, [tuple(f.shape) for f in block.factors], block.scale, block.shift
    ('kronecker', True, [(3, 3), (5, 5)], 2.0, 0.1)
    """

    params: tuple[str, ...]
    joint: bool
    kind: Kind
    rows: Tensor = field(repr=False)
    factors: tuple[Tensor, ...] = field(default=(), repr=False)
    basis: tuple[Tensor, ...] = field(default=(), repr=False)
    values: Tensor | None = field(default=None, repr=False)
    rest: float = 0.0
    scale: float = 1.0
    shift: float = 0.0

    @property
    def size(self) -> int:
        """The number of rows, n."""
        return len(self.rows)

    def dense(self) -> Tensor:
        """The block as (n, n) numbers."""
        whole = _DENSE[self.kind](self)
        eye = torch.eye(self.size, dtype=whole.dtype, device=whole.device)
        return self.scale * whole + self.shift * eye


def _products(factors: tuple[Tensor, ...]) -> Tensor:
    """F₁ ⊗ F₂ ⊗ …; of stacks, block-diagonal."""
    groups = [factors] if factors[0].ndim == 2 else zip(*factors, strict=True)
    whole: Tensor = torch.block_diag(*(reduce(torch.kron, group) for group in groups))
    return whole


def _from_basis(block: MatrixBlock) -> Tensor:
    q = _products(block.basis)
    assert block.values is not None
    full = (q * (block.values.to(q.dtype) - block.rest)) @ q.T
    full.diagonal().add_(block.rest)
    return full


def _from_values(block: MatrixBlock) -> Tensor:
    assert block.values is not None
    return torch.diag(block.values)


_DENSE: dict[Kind, Callable[[MatrixBlock], Tensor]] = {
    "kronecker": lambda block: _products(block.factors),
    "eigenbasis": _from_basis,
    "diagonal": _from_values,
    "low_rank": lambda block: block.factors[0] @ block.factors[1] @ block.factors[2].T,
    "dense": lambda block: block.factors[0],
}


def matrix_blocks(matrix: BoundMatrix, snapshot: Snapshot) -> tuple[MatrixBlock, ...]:
    """The blocks of a symmetric or square matrix on parameters, all arrays at hand.

    Args:
        matrix: whose matrix terms are bound.
        snapshot: the state.

    Raises:
        ExpressionError: it is known by its products alone, and too large to be built.
    """
    rows = torch.arange(matrix.size, device=matrix.problem.device)
    layout = part_layout(matrix.problem, matrix.expr.domain_params)
    place = MatrixBlock(params=(), joint=False, kind="dense", rows=rows)
    return tuple(
        replace(block, params=_names(layout, block.rows)) for block in _blocks(matrix.localised(), snapshot, place)
    )


def _names(layout: Layout, rows: Tensor) -> tuple[str, ...]:
    """The parameters that some rows are of, in the order in which they appear."""
    ends = torch.tensor([at.stop for at in layout.slices.values()], device=rows.device)
    owners = torch.bucketize(rows, ends, right=True)
    first = {int((owners == i).nonzero()[0]): int(i) for i in owners.unique()}
    return tuple(layout.names[first[at]] for at in sorted(first))


def _blocks(matrix: BoundMatrix, snapshot: Snapshot, place: MatrixBlock) -> Iterator[MatrixBlock]:
    """The blocks of a matrix that lies at the rows of a block."""
    parts, shift = affine(matrix.expr)
    if not parts:
        yield replace(place, kind="diagonal", values=_like(matrix).new_full((matrix.size,), shift))
        return
    scale, part = parts[0]
    if len(parts) == 1 and isinstance(part, BlockDiagonal) and isinstance(part.what, tuple) and part.complete:
        for block in part.what:
            inner = matrix.of(scale * block.expr + shift * Identity, block_problem(matrix.problem, block))
            yield from _blocks(inner.localised(), snapshot, _inside(place, block_places(matrix.problem, block)))
        return
    found = _of_leaf(part, _like(matrix), place) if len(parts) == 1 else None
    if found is not None:
        yield replace(found, scale=scale, shift=shift)
        return
    form, chain = forms.find(matrix)
    if form is None:
        raise ExpressionError(
            f"{matrix.expr} is known by its products alone ({'; '.join(chain)}); an approximation is made of arrays: "
            "nystrom(A, rank), diagonal_part(A), block_diagonal(A, by='module'), or a term such as kfac"
        )
    yield from _of_structure(form.at(snapshot), matrix, place)


def _inside(place: MatrixBlock, rows: RowRanges) -> MatrixBlock:
    """The place of rows inside those of a block; all of them, in another order, may be those of [W | b]."""
    taken = rows.take(place.rows)
    return replace(place, rows=taken, joint=bool(rows.outputs) or (place.joint and len(taken) == place.size))


def _like(matrix: BoundMatrix) -> Tensor:
    return torch.empty(0, dtype=matrix.problem.dtype, device=matrix.problem.device)


@singledispatch
def _of_leaf(leaf: Expr, like: Tensor, place: MatrixBlock) -> MatrixBlock | None:
    """The block of an array leaf; None for anything else."""
    return None


@_of_leaf.register
def _(leaf: Diagonal, like: Tensor, place: MatrixBlock) -> MatrixBlock:
    return replace(place, kind="diagonal", values=tensor(leaf.values, like))


@_of_leaf.register
def _(leaf: Kronecker, like: Tensor, place: MatrixBlock) -> MatrixBlock:
    factors = tuple(tensor(f, like) for f in leaf.factors)
    if leaf.plain and len(factors) == 1:
        return replace(place, kind="dense", factors=factors)
    return replace(place, kind="kronecker", factors=factors, rows=_ordered(place.rows, numbers(leaf.order, like)))


@_of_leaf.register
def _(leaf: Eigenbasis, like: Tensor, place: MatrixBlock) -> MatrixBlock:
    values = tensor(leaf.values, like)
    if not isinstance(leaf.basis, Kronecker):
        return replace(place, kind="eigenbasis", basis=(tensor(leaf.basis, like),), values=values)
    order = numbers(leaf.basis.order, like)
    basis = tuple(tensor(f, like) for f in leaf.basis.factors)
    return replace(
        place, kind="eigenbasis", basis=basis, values=_ordered(values, order), rows=_ordered(place.rows, order)
    )


@_of_leaf.register
def _(leaf: LowRank, like: Tensor, place: MatrixBlock) -> MatrixBlock:
    left = tensor(leaf.left, like)
    core = torch.eye(left.shape[1], dtype=left.dtype, device=left.device)
    if leaf.core is not None:
        core = tensor(leaf.core, like)
        core = torch.diag(core) if core.ndim == 1 else core
    right = left if leaf.right is None else tensor(leaf.right, like)
    return replace(place, kind="low_rank", factors=(left, core, right))


def _ordered(rows: Tensor, order: Tensor | None) -> Tensor:
    """Rows in the order of products, of which x[order] lies in that order."""
    return rows if order is None else rows[order]


def _of_structure(structure: Structure, matrix: BoundMatrix, place: MatrixBlock) -> Iterator[MatrixBlock]:
    """The blocks of a matrix whose form was found by what is known of it, such as an inverse."""
    if isinstance(structure, Blocks):
        for rows, part in structure.parts:
            yield from _of_structure(part, matrix, _inside(place, rows))
        return
    if isinstance(structure, Spectral) and (found := _of_spectral(structure, place)) is not None:
        yield found
        return
    dtype = matrix.problem.dtype
    if isinstance(structure, DenseMatrix):
        yield replace(place, kind="dense", factors=(structure.matrix.to(dtype),))
        return
    if structure.size > forms.DENSE_LIMIT:
        raise ExpressionError(
            f"{matrix.expr} has no arrays of its own, and {structure.size} rows are more than the {forms.DENSE_LIMIT} that are "
            "built; use products, or look at the structure of what is inside it"
        )
    eye = torch.eye(structure.size, dtype=dtype, device=matrix.problem.device)
    yield replace(place, kind="dense", factors=(structure.multiply(eye),))


def _of_spectral(structure: Spectral, place: MatrixBlock) -> MatrixBlock | None:
    basis = structure.basis
    if isinstance(basis, UnitBasis):
        return replace(place, kind="diagonal", values=structure.values)
    if isinstance(basis, MatrixBasis):
        rest = structure.rest if len(structure.values) < structure.size else 0.0
        return replace(place, kind="eigenbasis", basis=(basis.matrix,), values=structure.values, rest=rest)
    if isinstance(basis, KroneckerBasis):
        values, rows = _ordered(structure.values, basis.order), _ordered(place.rows, basis.order)
        return replace(place, kind="eigenbasis", basis=tuple(basis.factors), values=values, rows=rows)
    return None

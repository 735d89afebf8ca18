"""Orthonormal bases that grow by blocks. Vectors are rows here, so that each of them is contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from curvalg.tensors.memory import small, smalls, widest
from curvalg.tensors.spaces import Summand, VectorSpace
from curvalg.tensors.spaces.long_vectors import parts, vacant
from curvalg.tensors.spaces.vector_space import space_of


def orthonormalise(
    block: Tensor,
    basis: Tensor,
    scale: float,
    known: Tensor | None = None,
    first: int = 0,
    *,
    norms: Tensor | None = None,
    space: VectorSpace | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a block into its part in the span of a basis and new orthonormal directions.

    block = coefficients · basis + couplingᵀ · directions, by classical block Gram-Schmidt, with a singular value decomposition
    that drops the directions that are nothing but rounding noise. A second pass follows where the first took away so much
    that errors of the basis would grow (Daniel, Gragg, Kaufman and Stewart, 1976). A device is waited for once in each pass.

    Args:
        block: rows (p, n).
        basis: orthonormal rows (j, n).
        scale: norm of the operator that the block comes from; noise is relative to it, and to the block itself.
        known: coefficients (p, j − first) of the rows from ``first`` on, up to rounding: what they account for is taken off
            first, so that one pass is enough.
        first: row from which coefficients are not zero.
        norms: of the rows of the block (p,), where they are known.
        space: that the rows are in, which are whole by default.

    Returns:
        directions (r, n) with r ≤ p; coefficients (p, j) and coupling (r, p), float64 on the CPU.
    """
    space = space_of(block, space)
    longest = (space.norms(block, 1) if norms is None else norms).max()
    block, own = block.contiguous(), known is not None
    if known is None:
        known = block.new_zeros(len(block), 0)
    else:
        block = torch.addmm(block, known, basis[first:], alpha=-1)
    coefficients, block, each = _project(block, basis, own, space, space.lengths_part(block))
    length = torch.linalg.vector_norm(each)
    directions, triangle = _factorise(block, own or len(basis) > 0, space)
    longest, length, known, coefficients, triangle = smalls(longest, length, known, coefficients, triangle)
    noise = 10 * torch.finfo(block.dtype).eps * max(scale, float(longest))
    coefficients[:, len(basis) - known.shape[1] :] += known
    left, singular, right = torch.linalg.svd(triangle)
    rank = int((singular > noise).sum())
    if len(singular) == rank and (not len(basis) or float(singular.min()) > MUCH * length):
        return directions, coefficients, triangle
    directions = combine(left[:, :rank].T, directions)
    coupling = singular[:rank, None] * right[:rank]
    # Small directions were blown up when they were normalised, and with them what the first projection left behind.
    again, directions = _project(directions, basis, True, space)
    directions, triangle = _factorise(directions, True, space)
    again, triangle = smalls(again, triangle)
    return directions, coefficients + coupling.T @ again, triangle @ coupling


def triangle_of(rows: Tensor, space: VectorSpace | None = None) -> Tensor:
    """The triangle R (m, m) of rows = Rᵀ Q with orthonormal rows Q (m, n), float64 on the CPU; signs may be any."""
    if (space := space_of(rows, space)).whole:
        return small(torch.linalg.qr(rows.T, mode="r").R)
    return small(_factorise(rows, False, space)[1])


def complete(basis: Tensor, count: int, key: str, *, space: VectorSpace | None = None) -> Tensor:
    """Random orthonormal rows (count, n), orthogonal to a basis (j, n); there must be room, count ≤ n − j.

    Args:
        basis: orthonormal rows.
        count: how many.
        key: of the random numbers, as of :meth:`curvalg.tensors.spaces.VectorSpace.normals`.
        space: that the rows are in, which are whole by default.
    """
    space = space_of(basis, space)
    rows = space.normals(key, 0, count).to(basis)
    # In the last few dimensions almost nothing of a random vector is left, and twice is not enough.
    for _ in range(3):
        rows, _ = _factorise(_project(rows, basis, True, space)[1], True, space)
    return rows


def combine(weights: Tensor, rows: Tensor) -> Tensor:
    """The product weights (q, p) · rows (p, n), the weights from the small float64 problem."""
    return weights.to(rows) @ rows


def grown(basis: Tensor, new: Tensor, capacity: int) -> Tensor:
    """The basis with new rows below, in one storage with room for ``capacity`` rows.

    Rows are only ever appended: a basis that was made before stays as it is, although it shares the storage.
    """
    rows, n = basis.shape[0] + new.shape[0], basis.shape[1]
    room = basis.is_contiguous() and basis.storage_offset() == 0
    if not room or basis.untyped_storage().nbytes() < rows * n * basis.itemsize:
        # Memory that is not written yet costs nothing on most systems.
        wider = vacant(max(capacity, rows), n, basis)[: basis.shape[0]]
        basis = wider.copy_(basis)
    whole = basis.as_strided((rows, n), (n, 1))
    whole[basis.shape[0] :] = new
    return whole


MUCH = 0.7
"""What must be left of a block's length for one pass of Gram-Schmidt to be enough."""

NARROW = 8
"""Rows of a block up to which Gram-Schmidt is faster than a Householder factorisation of long vectors."""


def _project(block: Tensor, basis: Tensor, own: bool, space: VectorSpace, *more: Summand) -> tuple[Tensor, ...]:
    """The coefficients (p, j) of rows in a basis, on their device, and what is left of the rows; in their place if ``own``.

    After them come the sums of ``more``, which travel with the coefficients.
    """
    if not len(basis):
        return block.new_zeros(len(block), 0), block, *(space.joined(*more) if more else ())
    coefficients, *others = space.joined(space.gram_part(block, basis), *more)
    rest = block if own else torch.empty_like(block)
    return coefficients, torch.addmm(block, coefficients, basis, alpha=-1, out=rest), *others


def _factorise(block: Tensor, own: bool, space: VectorSpace) -> tuple[Tensor, Tensor]:
    """Factors of block = triangleᵀ · rows with orthonormal rows; one is zero where only rounding is left of it.

    The triangle of few rows is on their device, which is not waited for. The rows are put in the place of the block if it is
    the caller's ``own``: new memory costs more than what is computed in it.
    """
    # Between processes two exchanges for all rows are less than three for each.
    narrow = len(block) <= (NARROW if space.whole else 1)
    return _by_rows(block, own, space) if narrow else _by_gram_matrices(block, own, space)


def _by_rows(block: Tensor, own: bool, space: VectorSpace) -> tuple[Tensor, Tensor]:
    """Factors as of ``_factorise`` by Gram-Schmidt, one row after the other."""
    rows = block if own else torch.empty_like(block)
    triangle = block.new_zeros(len(block), len(block), dtype=widest(block.device))
    for i in range(len(block)):
        row = block[i : i + 1]
        # In float32, torch sums the squares of 5 million numbers with an error of 1e-4.
        before = space.lengths_part(row)
        if i:
            first, row, whole = _project(row, rows[:i], own, space, before)
            again, row = _project(row, rows[:i], True, space)
            triangle[:i, i], norm = (first + again)[0], space.lengths(row)[0]
        else:
            (whole,) = space.joined(before)
            norm = whole[0]
        rest = norm > 10 * torch.finfo(block.dtype).eps * whole[0]  # normalised noise is orthogonal to nothing
        triangle[i, i] = torch.where(rest, norm, 0.0)
        torch.div(row[0], torch.where(rest, norm, torch.inf).to(row.dtype), out=rows[i])
    return rows, triangle


def _by_gram_matrices(block: Tensor, own: bool, space: VectorSpace) -> tuple[Tensor, Tensor]:
    """Factors as of ``_factorise`` by Gram matrices, and of nearly dependent rows by reflections.

    Cholesky QR twice (Yamamoto, Nakatsukasa, Yanagisawa and Fukaya, ETNA 2015), which is orthonormal to rounding as long as
    the condition number is below eps^-1/2. Reflections are of whole vectors: where each process has a part, nearly dependent
    rows are taken one by one.
    """
    enough = 10 * torch.finfo(block.dtype).eps ** 0.5
    rows, triangle = block, torch.eye(len(block), dtype=torch.float64, device="cpu")
    gram = space.gram(block, block)
    for again in (True, False):
        factor, failed = torch.linalg.cholesky_ex(small(gram))
        pivots = factor.diagonal()
        if int(failed) or not float(pivots.min()) > enough * float(pivots.max()):
            orthonormal, last = _by_reflections(rows) if space.whole else _by_rows(rows, own, space)
            return orthonormal, small(last) @ triangle
        rows, gram = _divided(rows, factor, own, again, space)
        own, triangle = True, factor.T @ triangle
    return rows, triangle


def _by_reflections(rows: Tensor) -> tuple[Tensor, Tensor]:
    orthonormal, triangle = torch.linalg.qr(rows.T)
    return orthonormal.T.contiguous(), triangle


def _divided(rows: Tensor, factor: Tensor, own: bool, gram: bool, space: VectorSpace) -> tuple[Tensor, Tensor]:
    """The product factor⁻¹ · rows, in place of the rows if ``own``, and its Gram matrix if that is needed; one look at rows."""
    inverse = torch.linalg.inv(factor).to(rows)
    if rows.device.type != "cpu":
        divided = inverse @ rows
        return divided, space.gram(divided, divided) if gram else inverse
    place, total = (
        rows if own else vacant(len(rows), rows.shape[1], rows),
        torch.zeros_like(inverse, dtype=torch.float64),
    )
    for part in parts(rows.shape[1], len(rows), rows.device):
        divided = inverse @ rows[:, part]
        place[:, part] = divided
        if gram:
            total += divided @ space.weighed_part(divided, part).T
    return place, space.total(total) if gram else total

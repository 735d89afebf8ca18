"""Orthonormal bases that grow by blocks. Vectors are rows here, so that each of them is contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from curvalg.tensors.long_vectors import lengths, parts, vacant
from curvalg.tensors.memory import wide, widest


def orthonormalise(
    block: Tensor, basis: Tensor, scale: float, known: Tensor | None = None, first: int = 0
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

    Returns:
        directions (r, n) with r ≤ p; coefficients (p, j) and coupling (r, p), float64 on the CPU.
    """
    longest = block.norm(dim=1).max()
    block, own = block.contiguous(), known is not None
    if known is None:
        known = block.new_zeros(len(block), 0)
    else:
        block = torch.addmm(block, known, basis[first:], alpha=-1)
    length = torch.linalg.vector_norm(lengths(block))
    coefficients, block = _project(block, basis, own)
    directions, triangle = _factorise(block, own or len(basis) > 0)
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
    again, directions = _project(directions, basis, True)
    directions, triangle = _factorise(directions, True)
    again, triangle = smalls(again, triangle)
    return directions, coefficients + coupling.T @ again, triangle @ coupling


def complete(basis: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal rows (count, n), orthogonal to a basis (j, n); there must be room, count ≤ n − j.

    The numbers are drawn on the CPU, so that they do not depend on the device.
    """
    rows = torch.randn(count, basis.shape[1], generator=generator, dtype=torch.float64, device="cpu").to(basis)
    # In the last few dimensions almost nothing of a random vector is left, and twice is not enough.
    for _ in range(3):
        rows, _ = _factorise(_project(rows, basis, True)[1], True)
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


def small(t: Tensor) -> Tensor:
    """A tensor for the projected problem: float64 on the CPU."""
    return t.cpu().to(torch.float64)  # in two steps: some devices have no float64


def smalls(*tensors: Tensor) -> list[Tensor]:
    """Tensors for the projected problem, by one wait for the device."""
    away = [t for t in tensors if t.device.type != "cpu"]
    if not away:
        return [small(t) for t in tensors]
    packed = small(torch.cat([wide(t.reshape(-1)) for t in away]))
    parts = iter(packed.split([t.numel() for t in away]))
    return [small(t) if t.device.type == "cpu" else next(parts).reshape(t.shape) for t in tensors]


MUCH = 0.7
"""What must be left of a block's length for one pass of Gram-Schmidt to be enough."""

NARROW = 8
"""Rows of a block up to which Gram-Schmidt is faster than a Householder factorisation of long vectors."""


def _project(block: Tensor, basis: Tensor, own: bool) -> tuple[Tensor, Tensor]:
    """The coefficients (p, j) of rows in a basis, on their device, and what is left of the rows; in their place if ``own``."""
    if not len(basis):
        return block.new_zeros(len(block), 0), block
    coefficients = block @ basis.T
    rest = block if own else torch.empty_like(block)
    return coefficients, torch.addmm(block, coefficients, basis, alpha=-1, out=rest)


def _factorise(block: Tensor, own: bool) -> tuple[Tensor, Tensor]:
    """Factors of block = triangleᵀ · rows with orthonormal rows; one is zero where only rounding is left of it.

    The triangle of few rows is on their device, which is not waited for. The rows are put in the place of the block if it is
    the caller's ``own``: new memory costs more than what is computed in it.
    """
    if len(block) > NARROW:
        return _by_gram_matrices(block, own)
    rows = block if own else torch.empty_like(block)
    triangle = block.new_zeros(len(block), len(block), dtype=widest(block.device))
    for i in range(len(block)):
        row = block[i : i + 1]
        # In float32, torch sums the squares of 5 million numbers with an error of 1e-4.
        whole = norm = lengths(row)[0]
        if i:
            first, row = _project(row, rows[:i], own)
            again, row = _project(row, rows[:i], True)
            triangle[:i, i], norm = (first + again)[0], lengths(row)[0]
        rest = norm > 10 * torch.finfo(block.dtype).eps * whole  # normalised noise is orthogonal to nothing
        triangle[i, i] = torch.where(rest, norm, 0.0)
        torch.div(row[0], torch.where(rest, norm, torch.inf).to(row.dtype), out=rows[i])
    return rows, triangle


def _by_gram_matrices(block: Tensor, own: bool) -> tuple[Tensor, Tensor]:
    """Factors as of ``_factorise`` by Gram matrices, and of nearly dependent rows by reflections.

    Cholesky QR twice (Yamamoto, Nakatsukasa, Yanagisawa and Fukaya, ETNA 2015), which is orthonormal to rounding as long as
    the condition number is below eps^-1/2.
    """
    enough = 10 * torch.finfo(block.dtype).eps ** 0.5
    rows, triangle, gram = block, torch.eye(len(block), dtype=torch.float64, device="cpu"), block @ block.T
    for again in (True, False):
        factor, failed = torch.linalg.cholesky_ex(small(gram))
        pivots = factor.diagonal()
        if int(failed) or float(pivots.min()) <= enough * float(pivots.max()):
            orthonormal, last = torch.linalg.qr(rows.T)
            return orthonormal.T.contiguous(), small(last) @ triangle
        rows, gram = _divided(rows, factor, own, again)
        own, triangle = True, factor.T @ triangle
    return rows, triangle


def _divided(rows: Tensor, factor: Tensor, own: bool, gram: bool) -> tuple[Tensor, Tensor]:
    """The product factor⁻¹ · rows, in place of the rows if ``own``, and its Gram matrix if that is needed; one look at rows."""
    inverse = torch.linalg.inv(factor).to(rows)
    if rows.device.type != "cpu":
        divided = inverse @ rows
        return divided, divided @ divided.T if gram else inverse
    place, total = (
        rows if own else vacant(len(rows), rows.shape[1], rows),
        torch.zeros_like(inverse, dtype=torch.float64),
    )
    for part in parts(rows.shape[1], len(rows), rows.device):
        divided = inverse @ rows[:, part]
        place[:, part] = divided
        if gram:
            total += divided @ divided.T
    return place, total

"""Thick-restart block Lanczos: the decomposition, how it grows, and how it is compressed.

After some products, A V = V T + Q B: the rows of ``basis`` hold the vectors V that were multiplied and then the pending
block Q that was not; T is the projected matrix and B the coupling. Vectors found before, which the search stays orthogonal
to, stand in front. Sources: Golub and Underwood (1977) for blocks, Wu and Simon (SIAM J. Matrix Anal. Appl. 2000) for thick
restarts. All functions take a decomposition and return a new one, so that a search can stop and go on anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvalg.solve.orthogonal import complete, grown, orthonormalise
from curvalg.solve.powers import exponents, scaled
from curvalg.solve.solve_result import Matmul
from curvalg.tensors.memory import small
from curvalg.tensors.spaces import VectorSpace
from curvalg.tensors.spaces.long_vectors import vacant
from curvalg.tensors.spaces.vector_space import space_of


@dataclass(frozen=True)
class Krylov:
    """A Krylov decomposition A V = V T + Q B on the orthogonal complement of locked vectors.

    Args:
        basis: orthonormal rows (locked + a + p, n): locked vectors, V, Q.
        locked: how many rows the search stays orthogonal to.
        projected: T (a, a), symmetric, float64 on the CPU.
        coupling: B (p, a), float64 on the CPU.
        seed: of the random directions.
        draws: how many times random directions were drawn.
        space: that the rows are in.
    """

    basis: Tensor
    locked: int
    projected: Tensor
    coupling: Tensor
    seed: int
    draws: int
    space: VectorSpace

    @property
    def multiplied(self) -> int:
        """The dimension a of the projected problem."""
        return len(self.projected)

    @property
    def pending(self) -> Tensor:
        """The pending block Q, rows (p, n)."""
        return self.basis[self.locked + self.multiplied :]

    @property
    def vectors(self) -> Tensor:
        """The multiplied vectors V, rows (a, n)."""
        return self.basis[self.locked : self.locked + self.multiplied]

    @property
    def exhausted(self) -> bool:
        """Whether V spans everything there is to search, so that Ritz pairs are eigenpairs."""
        return not len(self.pending)

    def used(self) -> int:
        """The number of vectors held beside the locked ones."""
        return self.basis.shape[0] - self.locked


@dataclass(frozen=True)
class Ritz:
    """Ritz pairs: eigenpairs of the projected matrix.

    Args:
        values: ascending, (a,).
        weights: eigenvectors in the basis V, columns (a, a).
        estimates: ‖A y − θ y‖ by the coupling, (a,).
    """

    values: Tensor
    weights: Tensor
    estimates: Tensor

    @property
    def scale(self) -> float:
        """The largest |θ|, which tolerances are relative to."""
        return float(self.values.abs().max()) if len(self.values) else 0.0


def begin(
    locked: Tensor, start: Tensor, width: int, *, seed: int, capacity: int, space: VectorSpace | None = None
) -> Krylov:
    """An empty decomposition with a block to begin with.

    Args:
        locked: orthonormal rows (d, n) that the search stays orthogonal to; (0, n) for none.
        start: rows (s, n) that are wanted in the first block, s ≤ width; what is missing is drawn.
        width: rows of the block; fewer where there is no room.
        seed: of random directions.
        capacity: of the basis, locked vectors included.
        space: that the rows are in, which are whole by default.
    """
    none = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
    krylov = Krylov(locked, len(locked), none, none, seed, 0, space_of(locked, space))
    return _pend(krylov, start, width, capacity)


def extend(krylov: Krylov, matmul: Matmul, width: int, capacity: int) -> Krylov:
    """Multiply the pending block, and make the next one.

    Directions that collapse, in an invariant subspace, are replaced by random ones as long as there is room.
    """
    block, space = krylov.pending, krylov.space
    product = matmul(block.T.contiguous()).T
    scale = float(krylov.projected.abs().max()) if krylov.multiplied else 0.0
    a, p = krylov.multiplied, len(block)
    # Of the coupling only what is not zero: the last block, and after a restart all.
    coupled = krylov.coupling.any(0).nonzero()
    first = int(coupled[0]) if len(coupled) else a
    before = krylov.coupling[:, first:].to(product.dtype).to(product.device, non_blocking=True)
    norms, with_block = space.joined(space.norms_part(product, 1), space.gram_part(product, block))
    known = torch.cat([before, with_block], 1)
    directions, coefficients, coupling = orthonormalise(
        product, krylov.basis, scale, known, krylov.locked + first, norms=norms, space=space
    )
    columns = coefficients[:, krylov.locked :]
    projected = torch.zeros(a + p, a + p, dtype=torch.float64, device="cpu")
    projected[:a, :a] = krylov.projected
    projected[a:, :a], projected[:a, a:] = columns[:, :a], columns[:, :a].T
    projected[a:, a:] = (columns[:, a:] + columns[:, a:].T) / 2
    wider = torch.cat([torch.zeros(len(coupling), a, dtype=torch.float64, device="cpu"), coupling], 1)
    basis = grown(krylov.basis, directions, capacity)
    grown_ = replace(krylov, basis=basis, projected=projected, coupling=wider)
    return _drawn(grown_, width - len(directions), capacity)


def ritz(krylov: Krylov) -> Ritz:
    """The Ritz pairs of a decomposition."""
    values, weights = torch.linalg.eigh(krylov.projected)
    return Ritz(values, weights, (krylov.coupling @ weights).norm(dim=0))


def compress(krylov: Krylov, weights: Tensor, capacity: int) -> Krylov:
    """A thick restart: V becomes V · weights, for orthonormal weights (a, l) that span an invariant subspace of T.

    The subspace may be nearly invariant; the pending block stays, so that nothing is lost of vectors that are kept.
    """
    # One new storage, written once: at this size every copy counts.
    locked, n = krylov.locked, krylov.basis.shape[1]
    rows = locked + weights.shape[1] + len(krylov.pending)
    basis = vacant(max(capacity, rows), n, krylov.basis)[:rows]
    basis[:locked] = krylov.basis[:locked]
    torch.mm(weights.T.to(basis), krylov.vectors, out=basis[locked : locked + weights.shape[1]])
    basis[locked + weights.shape[1] :] = krylov.pending
    projected = weights.T @ krylov.projected @ weights
    return replace(krylov, basis=basis, projected=(projected + projected.T) / 2, coupling=krylov.coupling @ weights)


def rebuild(krylov: Krylov, kept: Tensor, products: Tensor, start: Tensor, width: int, capacity: int) -> Krylov:
    """A decomposition from vectors whose products are known, and another block to go on with.

    What the products have beyond the vectors and the new block is dropped: their residuals must be small, or in the block.

    Args:
        krylov: gives the locked vectors, and the state of the random numbers.
        kept: orthonormal rows (l, n).
        products: A times each of them, rows (l, n).
        start: rows (s, n) to go on with, such as residuals; () for random ones.
        width: rows of the block.
        capacity: of the basis.
    """
    projected = small(krylov.space.gram(products, kept))
    basis = grown(krylov.basis[: krylov.locked].clone(), kept, capacity)
    none = torch.zeros(0, len(kept), dtype=torch.float64, device="cpu")
    new = replace(krylov, basis=basis, projected=(projected + projected.T) / 2, coupling=none)
    new = _pend(new, start, width, capacity)
    return replace(new, coupling=small(new.space.gram(new.pending, products)))


def _pend(krylov: Krylov, start: Tensor, width: int, capacity: int) -> Krylov:
    """The decomposition with a pending block from given rows, filled up with random ones; there is none before."""
    space = krylov.space
    room = space.size - krylov.basis.shape[0]
    if len(start) and room:
        start = scaled(start, -exponents(start.T, space)[:, None])
        lengths = space.norms(start, 1)[:, None].clamp_min(torch.finfo(start.dtype).tiny)
        directions, _, _ = orthonormalise(start / lengths, krylov.basis, 0.0, space=space)
        krylov = replace(krylov, basis=grown(krylov.basis, directions[:room], capacity))
    coupling = torch.zeros(len(krylov.pending), krylov.multiplied, dtype=torch.float64, device="cpu")
    return _drawn(replace(krylov, coupling=coupling), width - len(krylov.pending), capacity)


def _drawn(krylov: Krylov, count: int, capacity: int) -> Krylov:
    """The decomposition with as many random directions in the pending block as there is room for; V is not coupled to them."""
    count = min(count, krylov.space.size - krylov.basis.shape[0])
    if count <= 0:
        return krylov
    # Other numbers than in the search that found the locked vectors: in a multiple eigenspace those are what the numbers of
    # that search left there, so that the same ones again would have no part in the rest of it.
    key = f"Lanczos {krylov.seed} {krylov.draws} {krylov.locked}"
    rows = complete(krylov.basis, count, key, space=krylov.space)
    coupling = torch.cat([krylov.coupling, torch.zeros(count, krylov.multiplied, dtype=torch.float64, device="cpu")])
    basis = grown(krylov.basis, rows, capacity)
    return replace(krylov, basis=basis, coupling=coupling, draws=krylov.draws + 1)

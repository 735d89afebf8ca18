"""The search for a few eigenpairs: grow, check with true residuals, restart, and look for what was missed.

A Krylov space of width p holds at most p eigenvectors of a repeated eigenvalue, so pairs that meet the tolerance are not
yet the right ones. They are challenged: the search goes on from random directions orthogonal to them, for as long as some
Ritz value might still turn out to belong to the wanted ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curvalg.solve.ends import Which, surpassed, unrivalled, wanted
from curvalg.solve.lanczos import Krylov, Ritz, begin, compress, extend, rebuild, ritz
from curvalg.solve.orthogonal import combine
from curvalg.solve.solve_result import Matmul
from curvalg.tensors.memory import small
from curvalg.tensors.spaces import VectorSpace

SEARCH, CHALLENGE, DONE, STAGNATED = "search", "challenge", "done", "stagnated"

MARGIN = 0.7
"""Estimates must be this much below the tolerance before products are spent on true residuals."""
MOST_REFUTED = 5
"""How often a true residual may refute the estimates before the tolerance counts as out of reach."""
SHORTEST, LONGEST = 8, 24
"""Blocks of a challenge: it may be decided after the first, and ends with the second where eigenvalues lie too close."""
CAUTION = 3.0
"""A Ritz value may still move by so many times its residual estimate: early in a challenge it settles near wrong ones."""


@dataclass(frozen=True)
class Aim:
    """The aim of a search: wanted pairs, tolerance and means.

    Args:
        k: how many pairs.
        which: "LA", "SA", "LM" or "BE".
        tol: ‖A v − θ v‖ ≤ tol · |θ|max for each of them.
        width: of blocks.
        subspace: the most vectors held, beside locked ones.
        seed: of random directions.
    """

    k: int
    which: Which
    tol: float
    width: int
    subspace: int
    seed: int


@dataclass(frozen=True)
class Search:
    """The state of a search for eigenpairs.

    Args:
        krylov: the decomposition; while the wanted pairs are challenged and when done, its first k vectors are theirs.
        phase: "search", "challenge", "done" or "stagnated".
        values: of the pairs last checked, ascending (k,), float64; empty before.
        residuals: their true residuals (k,).
        refuted: how often true residuals refuted the estimates.
        blocks: multiplied since the last check.
    """

    krylov: Krylov
    phase: str
    values: Tensor
    residuals: Tensor
    refuted: int
    blocks: int

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return self.phase in (DONE, STAGNATED)


def start(aim: Aim, locked: Tensor, rows: Tensor, *, space: VectorSpace | None = None) -> Search:
    """The state before the first product.

    Args:
        aim: what is searched.
        locked: orthonormal rows (d, n) to stay orthogonal to.
        rows: to begin with (s, n), random where none are given.
        space: that the rows are in, which are whole by default.
    """
    krylov = begin(locked, rows, aim.width, seed=aim.seed, capacity=len(locked) + aim.subspace, space=space)
    none = torch.zeros(0, dtype=torch.float64, device="cpu")
    return Search(krylov, SEARCH, none, none, 0, 0)


def step(search: Search, aim: Aim, matmul: Matmul) -> Search:
    """Multiply one block, and do whatever follows from it."""
    capacity = search.krylov.locked + aim.subspace
    krylov = extend(search.krylov, matmul, aim.width, capacity)
    search = replace(search, krylov=krylov, blocks=search.blocks + 1)
    if not _due(krylov, aim):
        return search
    pairs = ritz(krylov)
    if search.phase == CHALLENGE:
        search = _judged(search, aim, pairs)
    if search.phase == SEARCH and _claims(search, aim, pairs):
        return _checked(search, aim, pairs, matmul)
    if search.phase == SEARCH and _full(krylov, aim):
        return replace(search, krylov=_restarted(krylov, aim, pairs, 0))
    if search.phase == CHALLENGE and _full(krylov, aim):
        return replace(search, krylov=_restarted(krylov, aim, pairs, aim.k))
    return search


def check(search: Search, aim: Aim, matmul: Matmul) -> Search:
    """The wanted pairs as they are now, with true residuals; for a search that has to end."""
    pairs = ritz(search.krylov)
    if search.phase == CHALLENGE or search.over or len(pairs.values) < aim.k:
        return search
    return _checked(search, aim, pairs, matmul)


def current(search: Search, aim: Aim) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs (values ascending, vectors as rows, residuals) as known now; residuals are estimates before a check."""
    if search.phase != SEARCH:
        return search.values, search.krylov.vectors[: len(search.values)], search.residuals
    pairs = ritz(search.krylov)
    chosen = wanted(pairs.values, aim.which, min(aim.k, len(pairs.values)))
    rows = combine(pairs.weights[:, chosen].T, search.krylov.vectors)
    return pairs.values[chosen], rows, pairs.estimates[chosen]


def settled(search: Search, aim: Aim) -> int:
    """The number of the wanted pairs that meet the tolerance by estimate."""
    values, _, residuals = current(search, aim) if search.phase != SEARCH else _estimates(search, aim)
    scale = float(values.abs().max()) if len(values) else 0.0
    return int((residuals <= aim.tol * scale).sum())


def _estimates(search: Search, aim: Aim) -> tuple[Tensor, None, Tensor]:
    pairs = ritz(search.krylov)
    chosen = wanted(pairs.values, aim.which, min(aim.k, len(pairs.values)))
    return pairs.values[chosen], None, pairs.estimates[chosen]


def _due(krylov: Krylov, aim: Aim) -> bool:
    """Whether Ritz pairs should be computed now: their cost grows with the third power of the dimension."""
    stride = max(aim.width, krylov.multiplied // 32)
    return krylov.exhausted or _full(krylov, aim) or krylov.multiplied % stride < aim.width


def _full(krylov: Krylov, aim: Aim) -> bool:
    """Whether the next block does not fit into memory."""
    whole = krylov.basis.shape[0] >= krylov.space.size
    return not whole and krylov.used() + aim.width > aim.subspace


def _claims(search: Search, aim: Aim, pairs: Ritz) -> bool:
    if len(pairs.values) < aim.k:
        return False
    chosen = wanted(pairs.values, aim.which, aim.k)
    return search.krylov.exhausted or bool((pairs.estimates[chosen] <= MARGIN * aim.tol * pairs.scale).all())


def _checked(search: Search, aim: Aim, pairs: Ritz, matmul: Matmul) -> Search:
    """The search after a look at the true residuals of the wanted pairs."""
    krylov, chosen = search.krylov, wanted(pairs.values, aim.which, aim.k)
    capacity = krylov.locked + aim.subspace
    values = pairs.values[chosen]
    rows = combine(pairs.weights[:, chosen].T, krylov.vectors)
    # In blocks of the width that was found to be the fastest.
    products = torch.cat([matmul(part.T.contiguous()).T for part in rows.split(aim.width)])
    remainder = products - values[:, None].to(rows) * rows
    residuals = small(krylov.space.norms(remainder, 1))
    search = replace(search, values=values, residuals=residuals, blocks=0)
    if bool((residuals <= aim.tol * pairs.scale).all()):
        phase = DONE if krylov.exhausted else CHALLENGE
        fresh = rebuild(krylov, rows, products, rows[:0], aim.width, capacity)
        return replace(search, krylov=fresh, phase=phase)
    worst = residuals.argsort(descending=True)[: aim.width].to(rows.device)
    refuted = search.refuted + 1
    phase = SEARCH if refuted < MOST_REFUTED else STAGNATED
    fresh = rebuild(krylov, rows, products, remainder[worst], aim.width, capacity)
    return replace(search, krylov=fresh, phase=phase, refuted=refuted)


def _judged(search: Search, aim: Aim, pairs: Ritz) -> Search:
    """Whether the challenge is over, and who won."""
    krylov = search.krylov
    if surpassed(search.values, pairs.values, aim.which, aim.k, aim.tol * pairs.scale):
        return replace(search, phase=SEARCH)
    decided = unrivalled(pairs.values, CAUTION * pairs.estimates, aim.which, aim.k)
    over = krylov.exhausted or search.blocks >= (SHORTEST if decided else LONGEST)
    return replace(search, phase=DONE) if over else search


def _restarted(krylov: Krylov, aim: Aim, pairs: Ritz, fixed: int) -> Krylov:
    """Keep the first ``fixed`` vectors as they are, and the Ritz vectors that come next, which speed up what follows."""
    if fixed:
        values, vectors = torch.linalg.eigh(krylov.projected[fixed:, fixed:])
        pairs = Ritz(values, vectors, pairs.estimates)
    room, few = aim.subspace - 2 * aim.width - fixed, 1 if fixed else aim.k
    count = max(1, min(room, few + (room - few) // 2))
    kept = wanted(pairs.values, aim.which, min(count, len(pairs.values)))
    weights = torch.block_diag(torch.eye(fixed, dtype=pairs.weights.dtype, device="cpu"), pairs.weights[:, kept])
    return compress(krylov, weights, krylov.locked + aim.subspace)

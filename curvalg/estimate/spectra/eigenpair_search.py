"""The Lanczos search as a resumable algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from curvalg.estimate.spectra.block_width import choose_width
from curvalg.estimate.target import Target
from curvalg.runs.run_state import Options, State, is_count, sizes
from curvalg.runs.vector_digest import span_sums, vectors_digest
from curvalg.solve import Matmul
from curvalg.solve import search as searching
from curvalg.solve.ends import Which
from curvalg.solve.lanczos import Krylov
from curvalg.solve.orthogonal import combine, orthonormalise
from curvalg.solve.search import CHALLENGE, DONE, SEARCH, STAGNATED, Aim, Search

Block = int | Literal["auto"]

FEWEST, MOST = 20, 160
"""Vectors held: never fewer than the first, and more than are needed only up to the second."""
SPARE = 2**24
"""Numbers that vectors which are not needed, but speed up convergence, may take together."""


@dataclass(frozen=True)
class Lanczos:
    """Thick-restart block Lanczos for k pairs.

    Args:
        target: a symmetric operator.
        k, which, tol, block, seed: as of :func:`curvalg.estimate.eigsh`.
        start: rows to begin with (s, n).
        locked: orthonormal rows (d, n) to stay orthogonal to.
        most: products after which it stops.
        before: products that were spent before.
    """

    target: Target
    k: int
    which: Which
    tol: float
    block: Block
    seed: int
    start_rows: Tensor = field(repr=False)
    locked: Tensor = field(repr=False)
    most: int
    before: int = 0
    name: str = "eigsh"

    @property
    def options(self) -> Options:
        """All options but the number of products, so that a run that stopped there can be resumed with more."""
        return {
            "k": self.k,
            "which": self.which,
            "tol": self.tol,
            "block": self.block,
            "seed": self.seed,
            "v0": vectors_digest(self.start_rows, self.target.vectors),
            "deflate": span_sums(self.locked, self.target.vectors),
        }

    def axes(self, state: State) -> Mapping[str, int]:
        """The axis of the tensors that are vectors."""
        return {"basis": 1}

    def start(self) -> State:
        """Measure the width of the block, if that is asked for, and draw the first one."""
        counter = _Counter(self.target.multiply, self.before)
        width = self._width(counter) if self.block == "auto" else int(self.block)
        return self._pack(
            searching.start(self._aim(width), self.locked, self._first(width), space=self.target.vectors),
            width,
            counter.products,
        )

    def fits(self, state: State) -> bool:
        """Whether basis, projected matrix and pairs belong together."""
        counts = dict.fromkeys(("products", "draws", "refuted", "blocks"), is_count)
        found = sizes(
            state,
            {
                **counts,
                "width": lambda value: is_count(value) and value != 0,
                "phase": lambda value: value in (SEARCH, CHALLENGE, DONE, STAGNATED),
            },
            {
                "basis": (self.target.space.dtype, ("rows", self.target.local)),
                "projected": (torch.float64, ("a", "a")),
                "coupling": (torch.float64, ("p", "a")),
                "values": (torch.float64, ("pairs",)),
                "residuals": (torch.float64, ("pairs",)),
            },
        )
        return found is not None and found["rows"] == len(self.locked) + found["a"] + found["p"]

    def step(self, state: State) -> State:
        """Multiply one block of vectors."""
        width, counter = state.count("width"), _Counter(self.target.multiply, state.products)
        return self._pack(searching.step(self._unpack(state), self._aim(width), counter), width, counter.products)

    def done(self, state: State) -> bool:
        """Whether the search is over or out of products."""
        return self._unpack(state).over or state.products >= self.most

    def expected(self, state: State) -> int:
        """The expected products, as if all wanted pairs took as long as those that have converged."""
        found = searching.settled(self._unpack(state), self._aim(state.count("width")))
        return min(self.most, state.products * (self.k + 1) // (found + 1))

    def checked(self, state: State) -> State:
        """The state with true residuals, which takes k products if the search was stopped in between."""
        width, counter = state.count("width"), _Counter(self.target.multiply, state.products)
        return self._pack(searching.check(self._unpack(state), self._aim(width), counter), width, counter.products)

    def pairs(self, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs (values ascending, vectors as columns, residuals); residuals are estimates before a check."""
        values, rows, residuals = searching.current(self._unpack(state), self._aim(state.count("width")))
        return values, rows.T.contiguous(), residuals

    def phase(self, state: State) -> str:
        """The phase that the search was in."""
        return str(state.numbers["phase"])

    def _aim(self, width: int) -> Aim:
        return Aim(self.k, self.which, self.tol, width, self._subspace(width), self.seed)

    def _subspace(self, width: int) -> int:
        n = self.target.size - len(self.locked)
        needed = max(2 * self.k + 4 * width, FEWEST)
        return min(n, max(needed, min(MOST, SPARE // n)))

    def _first(self, width: int) -> Tensor:
        """The rows to begin with; of more than fit into a block, as many random mixtures, which reach the same directions."""
        if len(self.start_rows) <= width:
            return self.start_rows
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        mixing = torch.randn(width, len(self.start_rows), generator=generator, dtype=torch.float64, device="cpu")
        return combine(mixing, self.start_rows)

    def _width(self, counter: _Counter) -> int:
        space = self.target.space
        start = torch.ones(self.target.local, 1, dtype=space.dtype, device=space.device)
        basis = torch.full((self._subspace(1) * 3 // 4, self.target.local), 0.0, dtype=space.dtype, device=space.device)

        def block(x: Tensor) -> Tensor:
            product = counter(x)
            orthonormalise(
                product.T, basis, 0.0, space=space.vectors
            )  # on large vectors it takes about as long as the product
            return product

        return choose_width(block, start, min(self.k, max(1, self.target.size // 8)), space=space.vectors)

    def _pack(self, search: Search, width: int, products: int) -> State:
        krylov = search.krylov
        tensors = {
            "basis": krylov.basis,
            "projected": krylov.projected,
            "coupling": krylov.coupling,
            "values": search.values,
            "residuals": search.residuals,
        }
        numbers: Options = {
            "products": products,
            "width": width,
            "draws": krylov.draws,
            "phase": search.phase,
            "refuted": search.refuted,
            "blocks": search.blocks,
        }
        return State(tensors, numbers)

    def _unpack(self, state: State) -> Search:
        tensors, numbers = state.tensors, state.numbers
        krylov = Krylov(
            basis=tensors["basis"].to(self.target.space.device),
            locked=len(self.locked),
            projected=tensors["projected"],
            coupling=tensors["coupling"],
            seed=self.seed,
            draws=state.count("draws"),
            space=self.target.vectors,
        )
        return Search(
            krylov,
            str(numbers["phase"]),
            tensors["values"],
            tensors["residuals"],
            state.count("refuted"),
            state.count("blocks"),
        )


class _Counter:
    """A product that counts its columns."""

    def __init__(self, matmul: Matmul, products: int) -> None:
        self.matmul, self.products = matmul, products

    def __call__(self, x: Tensor) -> Tensor:
        result = self.matmul(x)
        self.products += x.shape[1]
        return result

"""Proofs of structured forms, made once, on random vectors, and believed from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvalg.lowering.blocks.rows import RowRanges
from curvalg.lowering.matrices import Blocks, Structure
from curvalg.problem.batch import lazy
from curvalg.solve.powers import norms
from curvalg.solve.solve_result import UNITS
from curvalg.tensors.memory import wide
from curvalg.tensors.random_numbers import normals

POWERS = 3
"""Products of a structure, by its own arrays, for a lower bound of its norm."""

Matmul = Callable[[Tensor], Tensor]
Take = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Piece:
    """A diagonal block, judged by itself: beside a large block, a small one would be right whatever it is.

    Args:
        take: its rows of columns (n, K).
        size: a lower bound of its norm.
    """

    take: Take
    size: float

    def holds(self, x: Tensor, b: Tensor, r: Tensor, epsilon: float) -> Tensor:
        """Which columns meet ‖r‖ ≤ k ε (‖A‖ ‖x‖ + ‖b‖), boolean (K,)."""
        r, whole = self._compared(x, b, r)
        return r <= UNITS * epsilon * whole

    def error(self, x: Tensor, b: Tensor, r: Tensor) -> float:
        """The largest ‖r‖ / (‖A‖ ‖x‖ + ‖b‖) of the columns; infinite where one is not finite."""
        r, whole = self._compared(x, b, r)
        return float(torch.where(r == 0, 0.0, r / whole).nan_to_num(torch.inf, torch.inf).amax())

    def _compared(self, x: Tensor, b: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        x, b, r = (wide(norms(self.take(t))) for t in (x, b, r))
        return r, self.size * x + b


@dataclass(frozen=True)
class Oath:
    """The proof of a structure, or the trust in it.

    Args:
        make_pieces: gives its blocks.
        epsilon: unit of rounding of the products.
        right: whether it is the matrix, A x = S x.
        solves: whether its solves need no refinement.
        errors: what products and solves left of ‖A‖ ‖x‖ + ‖b‖, each at most; None where nothing was compared.
        unchecked: the option that asked for that.
    """

    make_pieces: Callable[[], tuple[Piece, ...]]
    epsilon: float
    right: bool
    solves: bool
    errors: tuple[float, float] | None
    unchecked: str = ""

    @lazy
    def pieces(self) -> tuple[Piece, ...]:
        """The blocks of the structure, each judged by itself."""
        return self.make_pieces()

    def accepts(self, x: Tensor, b: Tensor, r: Tensor) -> Tensor:
        """Which columns of residuals r are rounding alone; none where the structure is not the matrix."""
        if not self.right:
            return torch.zeros(b.shape[1], dtype=torch.bool, device=b.device)
        return _hold(self.pieces, x, b, r, self.epsilon)


def trusted(structure: Structure, like: Tensor, epsilon: float, unchecked: str) -> Oath:
    """The oath of a structure that is believed at the user's word, an option, without a product of its matrix."""

    def pieces() -> tuple[Piece, ...]:  # only residuals need them
        x = _probe(structure, like)[:, :1]
        return _pieces(structure, x, structure.multiply(x))

    return Oath(pieces, epsilon, right=True, solves=True, errors=None, unchecked=unchecked)


def swear(structure: Structure, matmul: Matmul, like: Tensor, epsilon: float, refinements: int) -> Oath:
    """Compare a structure with the matrix that it stands for, by one product with three columns.

    S x against A x for a random x, and the residuals of two solves: of S x, whose solution is of moderate size, and of a
    random vector, whose solution lies along the smallest eigenvalues.

    Args:
        structure: S.
        matmul: X -> A X, by another way.
        like: gives dtype and device of the columns.
        epsilon: unit of rounding of the products.
        refinements: the most steps of iterative refinement.
    """
    probe = _probe(structure, like)
    x, b = probe[:, :1], probe.clone()
    b[:, :1] = structure.multiply(x)
    pieces = _pieces(structure, x, b[:, :1])
    y = structure.solve(b)
    products = matmul(torch.cat([x, y], 1))
    right = bool(_hold(pieces, x, b[:, :1], b[:, :1] - products[:, :1], epsilon).all())
    r = b - products[:, 1:]
    solves = bool(_hold(pieces, y, b, r, epsilon).all())
    errors = _error(pieces, x, b[:, :1], b[:, :1] - products[:, :1]), _error(pieces, y, b, r)
    refined = solves
    for _ in range(0 if solves or not right else refinements):
        y = y + structure.solve(r)
        r = b - matmul(y)
        refined = refined or bool(_hold(pieces, y, b, r, epsilon).all())
    return Oath(lambda: pieces, epsilon, right and refined, right and solves, errors)


def report(oaths: Sequence[Oath]) -> list[str]:
    """The lines of ``explain()`` on what was proved by the structures of one inverse, with the largest errors."""
    made = [(oath, oath.errors) for oath in oaths if oath.errors is not None]
    lines = []
    for option in dict.fromkeys(oath.unchecked for oath in oaths if oath.errors is None):
        lines.append(f"not verified, as {option} asks: products and solves were not compared with the matrix")
    for text, chosen in (
        ("verified: products and solves agree with products of the matrix", [m for m in made if m[0].solves]),
        (
            "verified: products agree with products of the matrix, and solves when they are refined, which every one is",
            [m for m in made if m[0].right and not m[0].solves],
        ),
        (
            "refuted: it does not agree with products of the matrix, and every solve has to meet its tolerance",
            [m for m in made if not m[0].right],
        ),
    ):
        if chosen:
            product, solve = (max(errors[i] for _, errors in chosen) for i in (0, 1))
            allowed = UNITS * max(oath.epsilon for oath, _ in chosen)
            lines.append(f"{text}; relative errors {product:.1e} and {solve:.1e}, {allowed:.1e} allowed")
    return lines


def _probe(structure: Structure, like: Tensor) -> Tensor:
    return normals((structure.size, 2), structure.size).to(like)


def _pieces(structure: Structure, x: Tensor, image: Tensor) -> tuple[Piece, ...]:
    """The blocks of a structure S, sized from a random x and S x."""
    return tuple(Piece(take, _size(block, take(x), take(image))) for take, block in _blocks(structure))


def _error(pieces: tuple[Piece, ...], x: Tensor, b: Tensor, r: Tensor) -> float:
    return max((piece.error(x, b, r) for piece in pieces), default=0.0)


def _hold(pieces: tuple[Piece, ...], x: Tensor, b: Tensor, r: Tensor, epsilon: float) -> Tensor:
    held = torch.ones(b.shape[1], dtype=torch.bool, device=b.device)
    for piece in pieces:
        held &= piece.holds(x, b, r, epsilon)
    return held


def _blocks(structure: Structure, take: Take = lambda x: x) -> Iterator[tuple[Take, Structure]]:
    if not isinstance(structure, Blocks):
        yield take, structure
        return
    for places, block in structure.parts:
        yield from _blocks(block, _inside(take, places))


def _inside(take: Take, places: RowRanges) -> Take:
    return lambda x: places.take(take(x))


def _size(structure: Structure, x: Tensor, image: Tensor) -> float:
    """A lower bound of ‖S‖, by steps of the power method of which the first is known, S x."""
    norm = norms(x)
    if not bool(norm > 0):
        return 0.0
    x = image / norm
    size = float(norms(x))
    for _ in range(POWERS - 1):
        norm = norms(x)
        if not bool(norm > 0):
            return size
        x = structure.multiply(x / norm)
        size = max(size, float(norms(x)))
    return size

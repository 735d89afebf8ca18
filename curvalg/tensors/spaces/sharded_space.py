"""The space of vectors that are spread over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from curvalg.tensors.memory import wide, widest
from curvalg.tensors.spaces.long_vectors import lengths, parts
from curvalg.tensors.spaces.vector_space import Summand, VectorSpace


class Exchanger(Protocol):
    """What processes tell each other. All call the same methods in the same order, with tensors of the same shape and dtype."""

    rank: int
    """Of this process."""

    def together(self, what: object) -> AbstractContextManager[None]:
        """A context in which an error of one process is one of all."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, entry by entry; the same bits on each of them."""
        ...

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest over processes, entry by entry; the same bits on each of them."""
        ...


class ShardedSpace(VectorSpace):
    """The space of vectors of which this process holds some numbers.

    Sums over processes are taken in double precision.

    Args:
        size: numbers of a vector, over all processes, each counted once.
        pieces: runs (first place in the whole vector, length) that a vector here consists of, one after the other.
        exchanger: of all processes that hold a part.
        weights: for each number held here 1 / how many times it is held by all processes together, (local,); None where each
            is held once.

    Raises:
        ValueError: a piece outside of the vector, or as many weights as there are no numbers.
    """

    whole = False

    def __init__(
        self, size: int, pieces: Sequence[tuple[int, int]], exchanger: Exchanger, weights: Tensor | None = None
    ) -> None:
        super().__init__(size)
        self._pieces = tuple((int(place), int(length)) for place, length in pieces)
        self._local = sum(length for _, length in self._pieces)
        self._exchanger = exchanger
        self.weights = weights
        if any(place < 0 or length < 0 or place + length > size for place, length in self._pieces):
            raise ValueError(f"expected pieces (first place, length) within {size} numbers, got {list(self._pieces)}")
        if weights is not None and tuple(weights.shape) != (self._local,):
            raise ValueError(
                f"expected {self._local} weights, one for each number held here, got {tuple(weights.shape)}"
            )

    @property
    def local(self) -> int:
        return self._local

    @property
    def pieces(self) -> tuple[tuple[int, int], ...]:
        return self._pieces

    @property
    def copies(self) -> Tensor | None:
        return None if self.weights is None else (1 / self.weights).round().long()

    # -- the two exchanges ----------------------------------------------------------------------------------------------

    def total(self, part: Tensor) -> Tensor:
        return self.joined(Summand(part))[0]

    def most(self, part: Tensor) -> Tensor:
        # Of NaN and a number either may count as the larger one, by the order of the processes.
        found = self._exchanger.largest(wide(part).nan_to_num(torch.inf, torch.inf, -torch.inf))
        return found.to(part.dtype)

    def joined(self, *summands: Summand) -> list[Tensor]:
        here = [summand.here for summand in summands]
        device = here[0].device
        packed = torch.cat([t.reshape(-1).to(device, widest(device)) for t in here])
        if len(packed):
            packed = self._exchanger.sum(packed)
        sums = packed.split([t.numel() for t in here])
        return [
            summand.finish(found.reshape(t.shape).to(t)) for summand, t, found in zip(summands, here, sums, strict=True)
        ]

    # -- what is summed over numbers -------------------------------------------------------------------------------------

    def weighed(self, rows: Tensor) -> Tensor:
        return rows if self.weights is None else rows * self.weights.to(rows)

    def weighed_part(self, rows: Tensor, part: slice) -> Tensor:
        return rows if self.weights is None else rows * self.weights[part].to(rows)

    def dots_part(self, left: Tensor, right: Tensor, dim: int = 0) -> Summand:
        if dim == 0:
            left, right = left.T, right.T
        return Summand((self.weighed(left) * right).sum(1))

    def norms_part(self, x: Tensor, dim: int = 0) -> Summand:
        rows = x if dim else x.T
        return _rooted(self._squares(rows, lambda t: wide(t.norm(dim=1))), rows.dtype)

    def lengths_part(self, rows: Tensor) -> Summand:
        return _rooted(self._squares(rows, lengths), widest(rows.device))

    def squares_part(self, rows: Tensor) -> Summand:
        return self.lengths_part(rows)

    def wide_norms(self, rows: Tensor) -> Tensor:
        return self.lengths(rows)

    def _squares(self, rows: Tensor, of_unweighed: Callable[[Tensor], Tensor]) -> Tensor:
        """The sums of squares of rows (m, local) in double precision, by their norms where numbers are held once."""
        if self.weights is None:
            return of_unweighed(rows).square()
        sums = torch.zeros(len(rows), dtype=widest(rows.device), device=rows.device)
        weights = self.weights.to(sums)
        for part in parts(rows.shape[1], len(rows), rows.device):
            sums += wide(rows[:, part]).square() @ weights[part]
        return sums

    def gram_part(self, left: Tensor, right: Tensor) -> Summand:
        return Summand(left @ self.weighed(right).T)

    def dot_part(self, x: Tensor, y: Tensor) -> Tensor:
        return super().dot_part(x, self.weighed(y))

    # -- what is looked at ------------------------------------------------------------------------------------------------

    def longest(self, number: float) -> float:
        return float(self.most(torch.tensor([number], dtype=torch.float64, device="cpu")))

    def together(self, columns: int) -> list[int]:
        fewest, most = self._exchanger.largest(
            torch.tensor([-columns, columns], dtype=torch.float64, device="cpu")
        ).tolist()
        return [int(-fewest), int(most)]


def _rooted(squares: Tensor, dtype: torch.dtype) -> Summand:
    """A sum of squares in double precision, of which the root is taken in the end."""
    return Summand(squares, lambda total: total.sqrt().to(dtype))

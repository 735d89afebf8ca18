"""The space that the vectors of a computation are in: all that is summed or drawn over their numbers goes through it.

Solvers and estimators work on vectors whose numbers may be spread over processes, each of which runs the same program on the
numbers that it holds. What is done entry by entry needs nobody else. Whatever depends on all numbers, an inner product or the
largest magnitude, is made of two exchanges: a sum and a maximum over processes. All others follow from these, and are the same
on every process, so that decisions that look at nothing else are the same, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from curvalg.tensors.memory import smalls, wide, widest
from curvalg.tensors.spaces.long_vectors import dot, lengths, parts, vacant
from curvalg.tensors.spaces.random_vectors import Fill, bits, draw, normal


def _same(total: Tensor) -> Tensor:
    return total


@dataclass(frozen=True)
class Summand:
    """What one process adds to a sum over processes, and what is made of the sum.

    Args:
        here: the part of this process; of the same shape and dtype on all of them.
        finish: a function of the sum, such as the square root.
    """

    here: Tensor
    finish: Callable[[Tensor], Tensor] = _same


class VectorSpace:
    """The space of vectors that this process holds as a whole.

    Vectors are columns (n, K) or rows (m, n). Sums are those of plain torch, down to the last bit. A process that holds a part
    of each vector has a :class:`~curvalg.tensors.spaces.ShardedSpace`, of the same interface.

    Attributes:
        size: the number n of numbers of a vector, over all processes.
        whole: whether this process holds all of them.

    Args:
        size: n.

    >>> space = VectorSpace(3)
    >>> space.dots(torch.ones(3, 2), torch.ones(3, 2))
    tensor([3., 3.])
    """

    whole = True

    def __init__(self, size: int) -> None:
        self.size = size

    @property
    def local(self) -> int:
        """How many numbers of a vector this process holds."""
        return self.size

    @property
    def pieces(self) -> tuple[tuple[int, int], ...]:
        """The numbers held here: runs (first place in the whole vector, length) that lie one after the other."""
        return ((0, self.size),)

    @property
    def copies(self) -> Tensor | None:
        """How many processes hold each number, (local,) integers; None where each is held once."""
        return None

    # -- the two exchanges ----------------------------------------------------------------------------------------------

    def total(self, part: Tensor) -> Tensor:
        """The sum over processes of what each has summed over its numbers."""
        return part

    def most(self, part: Tensor) -> Tensor:
        """The largest over processes, entry by entry; NaN counts as infinite where there are several."""
        return part

    def joined(self, *summands: Summand) -> list[Tensor]:
        """The sums of several things over processes, each finished; they travel together."""
        return [summand.finish(summand.here) for summand in summands]

    def totals(self, *sums: Tensor) -> list[Tensor]:
        """The totals of several tensors, which travel together."""
        return self.joined(*map(Summand, sums))

    # -- what is summed over numbers -------------------------------------------------------------------------------------

    def weighed(self, rows: Tensor) -> Tensor:
        """Rows (..., n) with each number over the number of processes that hold it, as one factor of an inner product."""
        return rows

    def dots_part(self, left: Tensor, right: Tensor, dim: int = 0) -> Summand:
        """The inner products of columns (n, K) with their like, (K,), or with ``dim=1`` of rows."""
        return Summand((left * right).sum(dim))

    def norms_part(self, x: Tensor, dim: int = 0) -> Summand:
        """The Euclidean norms of columns (n, K), (K,) in their dtype, or with ``dim=1`` of rows."""
        return Summand(x.norm(dim=dim))

    def lengths_part(self, rows: Tensor) -> Summand:
        """The Euclidean lengths of rows (m, n), summed in float64: (m,)."""
        return Summand(lengths(rows))

    def squares_part(self, rows: Tensor) -> Summand:
        """The norms of rows (m, n) by sums of squares in their dtype, and in float64 where those leave its range: (m,)."""
        if rows.device.type != "cpu":  # where a sum in double precision is as fast, and a look at the squares is a wait
            return Summand(torch.linalg.vector_norm(rows, dim=1, dtype=widest(rows.device)))
        # Elementwise first: torch.sum adds in pairs, but dot and vector_norm of long float32 vectors err by 1e-4.
        squares, info = (rows * rows).sum(1).double(), torch.finfo(rows.dtype)
        if bool(((squares < info.tiny / info.eps**2) | (squares > info.max)).any()):
            squares = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
        return Summand(squares.sqrt())

    def gram_part(self, left: Tensor, right: Tensor) -> Summand:
        """The inner products of rows (p, n) and (q, n), (p, q), in their dtype and on their device."""
        return Summand(left @ right.T)

    def dot_part(self, x: Tensor, y: Tensor) -> Tensor:
        """What this process adds to the inner product of two vectors (n,), in float64 on their device."""
        return dot(x, y)

    def dots(self, left: Tensor, right: Tensor, dim: int = 0) -> Tensor:
        """Inner products as of :meth:`dots_part`."""
        return self.joined(self.dots_part(left, right, dim))[0]

    def norms(self, x: Tensor, dim: int = 0) -> Tensor:
        """Norms as of :meth:`norms_part`."""
        return self.joined(self.norms_part(x, dim))[0]

    def lengths(self, rows: Tensor) -> Tensor:
        """Lengths as of :meth:`lengths_part`."""
        return self.joined(self.lengths_part(rows))[0]

    def wide_norms(self, rows: Tensor) -> Tensor:
        """The norms of rows (m, n), all in the widest float of their device: (m,)."""
        exact: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=widest(rows.device))
        return exact

    def gram(self, left: Tensor, right: Tensor) -> Tensor:
        """Inner products as of :meth:`gram_part`."""
        return self.joined(self.gram_part(left, right))[0]

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """Inner products of rows (p, n) and (q, n), summed in float64: (p, q) on the CPU."""
        return self.inners((left, right))[0]

    def inners(self, *pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Inner products as of :meth:`inner` for pairs of rows, each of which is read once; by one wait for the device."""
        rows = {id(t): t for pair in pairs for t in pair}
        first = next(iter(rows.values()))
        sums = [torch.zeros(len(p), len(q), dtype=widest(first.device), device=first.device) for p, q in pairs]
        for part in parts(first.shape[1], sum(map(len, rows.values())), first.device):
            taken = {key: wide(t[:, part]) for key, t in rows.items()}
            for total, (p, q) in zip(sums, pairs, strict=True):
                total.addmm_(taken[id(p)], self.weighed_part(taken[id(q)], part).T)
        return smalls(*self.totals(*sums))

    def weighed_part(self, rows: Tensor, part: slice) -> Tensor:
        """Rows as of :meth:`weighed`, of which only some of the numbers held here are given."""
        return rows

    # -- what is looked at ------------------------------------------------------------------------------------------------

    def peaks(self, columns: Tensor) -> Tensor:
        """The largest magnitude in each column (n, K), (K,); NaN or infinity where there is one."""
        if not len(columns):
            return self.most(columns.new_zeros(columns.shape[1]))
        return self.most(columns.abs().amax(0))

    def anywhere(self, columns: Tensor) -> Tensor:
        """In which columns (n, K) of truth values there is a True, (K,)."""
        return self.most(columns.any(0))

    def longest(self, number: float) -> float:
        """The largest of the numbers that the processes have: what one decides by a clock, all decide alike by this."""
        return number

    def together(self, columns: int) -> list[int]:
        """The numbers of columns that the processes are about to multiply: where they differ, none of them may begin."""
        return [columns]

    # -- vectors that are made -----------------------------------------------------------------------------------------

    def normals(self, key: str, start: int, stop: int) -> Tensor:
        """Vectors start ≤ i < stop of a sequence with standard normal numbers, as rows in float32 on the CPU.

        Args:
            key: of the sequence; each number depends on the key, i and its place in the vector alone.
            start, stop: numbers of the vectors.
        """
        return self._drawn(key, start, stop, normal)

    def signs(self, key: str, start: int, stop: int) -> Tensor:
        """Vectors as of :meth:`normals` whose numbers are −1 or 1."""
        return self._drawn(key, start, stop, bits).mul_(2).sub_(1)

    def _drawn(self, key: str, start: int, stop: int, fill: Fill) -> Tensor:
        # In place: new memory costs more than the numbers.
        rows = vacant(stop - start, self.local, torch.empty(0, device="cpu"))
        return draw(rows, key, start, self.size, self.pieces, fill)

    def units(self, start: int, stop: int, like: Tensor) -> Tensor:
        """The unit vectors start ≤ i < stop as rows, of the dtype and device of a tensor."""
        rows = torch.zeros(stop - start, self.local, dtype=like.dtype, device=like.device)
        at = 0
        for place, length in self.pieces:
            first, last = max(place, start), min(place + length, stop)
            if first < last:
                some = torch.arange(first, last, device=like.device)
                rows[some - start, some - place + at] = 1
            at += length
        return rows


def space_of(vectors: Tensor, space: VectorSpace | None, dim: int = -1) -> VectorSpace:
    """The space, by default that of vectors which lie along the given dimension and are whole."""
    return VectorSpace(vectors.shape[dim]) if space is None else space

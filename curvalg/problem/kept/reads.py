"""What a product reads from one call to the next: as long as it is the same, so are its kernels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from curvalg.problem.kept.cache import Keeper


@dataclass(frozen=True, eq=False)
class Reads:
    """The kept memory that a product reads, beside its operand.

    Args:
        parts: the objects that hold it, compared by identity.
        keepers: of these, known to the budget.
    """

    parts: tuple[object, ...] = ()
    keepers: tuple[Keeper, ...] = ()

    def same(self, other: Reads | str) -> bool:
        """Whether the same objects are read."""
        return isinstance(other, Reads) and [*map(id, self.parts)] == [*map(id, other.parts)]


def together(found: Iterable[Reads | str]) -> Reads | str:
    """What several products read, or the first reason why one is not the same kernels each time."""
    parts: list[object] = []
    keepers: list[Keeper] = []
    for reads in found:
        if isinstance(reads, str):
            return reads
        parts += reads.parts
        keepers += reads.keepers
    return Reads(tuple(parts), tuple(keepers))

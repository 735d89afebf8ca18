"""The questions that a structured matrix answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from curvalg.errors import FactsError
from curvalg.problem.kept.reads import Reads, together

Function = Callable[[Tensor], Tensor]
"""A real function, entry by entry."""


@dataclass(frozen=True)
class Eigh:
    """All eigenpairs of a symmetric matrix, the vectors made when asked for.

    Args:
        eigenvalues: those with vectors of their own, ascending, shape (r,), float64.
        rest: the one eigenvalue of everything orthogonal to these vectors.
        multiplicity: how often ``rest`` occurs, n − r.
        make: positions (k,) among the eigenvalues -> eigenvectors (n, k).
    """

    eigenvalues: Tensor
    rest: float
    multiplicity: int
    make: Callable[[Tensor], Tensor] = field(repr=False)

    def vectors(self, positions: slice | Tensor) -> Tensor:
        """Orthonormal eigenvectors (n, k) of the chosen eigenvalues; k vectors of a large matrix are k · n numbers."""
        return self.make(torch.arange(len(self.eigenvalues), device=self.eigenvalues.device)[positions])


class Structure(ABC):
    """A square matrix of which products with functions of it are exact.

    Args:
        size: number of rows, n.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    @property
    def inner(self) -> tuple[Structure, ...]:
        """The structures that it is made of."""
        return ()

    def reads(self) -> Reads | str:
        """What products and solves read that others may drop, or why they are not the same kernels each time."""
        found = together(part.reads() for part in self.inner)
        return found if isinstance(found, str) else Reads((self, *found.parts), found.keepers)

    @abstractmethod
    def solve(self, b: Tensor) -> Tensor:
        """Solve A X = B for columns (n, K).

        Raises:
            FactsError: singular to working precision.
        """

    @abstractmethod
    def mapped(self, function: Function, name: str) -> Structure | None:
        """The function f(A) by the eigenvalues; None where only solves are cheap."""

    @abstractmethod
    def multiply(self, x: Tensor) -> Tensor:
        """The product A X for columns (n, K)."""

    @abstractmethod
    def trace(self) -> float | None:
        """The sum of the diagonal; None where it is not known cheaply, as in all questions below."""

    @abstractmethod
    def diagonal(self) -> Tensor | None:
        """The diagonal of the matrix, shape (n,)."""

    def inverse_diagonal(self) -> Tensor | None:
        """The diagonal of the inverse, shape (n,)."""
        inverse = self.mapped(torch.reciprocal, "inverse")
        return None if inverse is None else inverse.diagonal()

    @abstractmethod
    def logdet(self) -> float | None:
        """The number log |det A|; −∞ for a singular matrix."""

    @abstractmethod
    def eigh(self) -> Eigh | None:
        """The eigenpairs of a symmetric matrix."""


def singular(what: str, zeros: int) -> FactsError:
    """The error for a matrix without an inverse."""
    return FactsError(
        f"{what} has no inverse, for {zeros} of its eigenvalues are zero to working precision; add damping, c * Identity"
    )

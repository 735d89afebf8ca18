"""A low-rank update of a structured matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvalg.errors import FactsError
from curvalg.lowering.matrices.structure import Eigh, Function, Structure
from curvalg.solve import factorize
from curvalg.tensors.memory import wide, widest


class Woodbury(Structure):
    """The matrix B + L C Rᵀ, inverted as B⁻¹ − B⁻¹ L (I + C Rᵀ B⁻¹ L)⁻¹ C Rᵀ B⁻¹, which needs no inverse of C.

    Woodbury, 1950; Golub and Van Loan, Matrix Computations, §2.1.4.

    Args:
        base: B, with a cheap solve.
        left: L (n, r).
        core: C (r, r).
        right: R (n, r).
        otherwise: this matrix in another form, for a B without an inverse (the sum may have one); None: there is none.
    """

    def __init__(
        self,
        base: Structure,
        left: Tensor,
        core: Tensor,
        right: Tensor,
        otherwise: Callable[[], Structure] | None = None,
    ) -> None:
        super().__init__(base.size)
        self.base, self.left, self.core, self.right = base, left, core, right
        self._inner: Tensor | None = None
        self._small: Callable[[Tensor], Tensor] | None = None
        self._make_other = otherwise
        self._other: Structure | None = None

    @property
    def inner(self) -> tuple[Structure, ...]:
        return (self.base,) if self._other is None else (self._other,)

    def multiply(self, x: Tensor) -> Tensor:
        left, core, right = (t.to(x.dtype) for t in (self.left, self.core, self.right))
        return self.base.multiply(x) + left @ (core @ (right.T @ x))

    def _spread(self) -> Tensor:
        """The matrix B⁻¹ L."""
        if self._inner is None:
            self._inner = self.base.solve(wide(self.left))
        return self._inner

    def _capacitance(self) -> Tensor:
        """The matrix I + C Rᵀ B⁻¹ L."""
        eye = torch.eye(self.core.shape[0], dtype=widest(self.core.device), device=self.core.device)
        return eye + wide(self.core) @ (wide(self.right).T @ self._spread())

    def _otherwise(self) -> Structure | None:
        """The other form, where B has no inverse; None where it has."""
        if self._inner is None and self._other is None:
            try:
                self._spread()
            except FactsError:
                if self._make_other is None:
                    raise
                self._other = self._make_other()
        return self._other

    def solve(self, b: Tensor) -> Tensor:
        if (other := self._otherwise()) is not None:
            return other.solve(b)
        if self._small is None:
            self._small = factorize(self._capacitance(), positive_definite=None)
        first = self.base.solve(wide(b))
        projected = wide(self.core) @ (wide(self.right).T @ first)
        return (first - self._spread() @ self._small(projected)).to(b.dtype)

    def mapped(self, function: Function, name: str) -> None:
        return None

    def trace(self) -> float | None:
        base = self.base.trace()
        return None if base is None else base + float(wide((self.left @ self.core) * self.right).sum())

    def diagonal(self) -> Tensor | None:
        base = self.base.diagonal()
        return None if base is None else base + ((self.left @ self.core) * self.right).sum(1)

    def logdet(self) -> float | None:
        if (other := self._otherwise()) is not None:
            return other.logdet()
        base = self.base.logdet()
        return None if base is None else base + float(torch.linalg.slogdet(self._capacitance()).logabsdet)

    def eigh(self) -> Eigh | None:
        return None

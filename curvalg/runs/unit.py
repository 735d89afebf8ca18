"""A power of two as the unit of an operator: whatever its scale, algorithms work on numbers near one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from curvalg.errors import ProblemError
from curvalg.solve.powers import scaled
from curvalg.tensors.spaces import VectorSpace

Matmul = Callable[[Tensor], Tensor]

ORDINARY, ROOM = 1 / 16, 3 / 32
"""Shares of the range of exponents, in bits to either side of one: operators within the first are left as they are, and no
product may exceed the unit by more than the second. Fourth powers, which errors of errors are made of, then stay in range:
of float32 2⁻⁶⁴ to 2⁹⁶, with as much below for rounding errors, and above for the squares of many entries."""
SMALLEST = 16
"""Vectors are of length one or √n, so that their largest entry is hardly ever below 2⁻¹⁶."""


class Outgrown(ProblemError):
    """A product that is much larger than the unit, which it has raised; what was computed is in the old one."""


@dataclass(frozen=True)
class Finite:
    """A product that refuses to be anything else.

    Args:
        raw: x -> the product and its largest magnitude here, NaN where an entry is.
        name: of the operator, for messages.
        images: the space that products are in.
    """

    raw: Callable[[Tensor], tuple[Tensor, float]]
    name: str
    images: VectorSpace

    def __call__(self, x: Tensor) -> Tensor:
        return self.sized(x)[0]

    def sized(self, x: Tensor) -> tuple[Tensor, float]:
        """The product and its largest magnitude.

        Raises:
            ProblemError: it is not finite.
        """
        result, largest = self.raw(x)
        largest = self.images.longest(largest)
        if not math.isfinite(largest):
            raise ProblemError(
                f"expected finite products, but {self.name} gave NaN or infinite entries for finite vectors; look at the "
                "operator, or at the loss and its second derivative there"
            )
        return result, largest


class PowerOfTwo:
    """The unit 2^exponent, near the norm of an operator.

    It is found from the first product that is not zero, which costs nothing, and is 1 at ordinary scales. Powers of two are
    exact, so that no digit depends on it, except for those that would otherwise be lost to under- or overflow. Where a first
    vector said nothing of the norm, the first product that shows it raises :class:`Outgrown`.

    Args:
        name: of the operator, for messages.
        dtype: of its products.
    """

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype
        self.exponent: int | None = None
        """None before there is a product; all results are zero then, which is so in any unit."""
        bits = 2 * math.frexp(torch.finfo(dtype).max)[1]
        self._ordinary, self._room = int(ORDINARY * bits), int(ROOM * bits)

    def measuring(self, multiply: Matmul, vectors: VectorSpace, images: VectorSpace) -> Matmul:
        """A product whose result is in this unit.

        Args:
            multiply: the product, in true numbers.
            vectors, images: the spaces that it goes from and to.
        """
        finite = multiply if isinstance(multiply, Finite) else Finite(sized(multiply), self.name, images)

        def product(x: Tensor) -> Tensor:
            y, largest = finite.sized(x)
            if largest:
                self._measure(x, _exponent(largest), vectors)
            return self.to(y)

        return product

    def to(self, x: Tensor) -> Tensor:
        """Convert true numbers to this unit."""
        return self._times(x, -1)

    def back(self, x: Tensor) -> Tensor:
        """Convert numbers in this unit to true numbers.

        Raises:
            ProblemError: they are out of range.
        """
        result = self._times(x, 1)
        if self.exponent and bool((torch.isinf(result) & ~torch.isinf(x)).any()):
            raise ProblemError(
                f"the result for {self.name} is beyond the range of {str(x.dtype).removeprefix('torch.')}; divide the operator "
                "by a power of two, and multiply what comes out"
            )
        return result

    def _times(self, x: Tensor, sign: int) -> Tensor:
        return scaled(x, torch.tensor(sign * self.exponent, device=x.device)) if self.exponent else x

    def _measure(self, x: Tensor, size: int, vectors: VectorSpace) -> None:
        """Find the unit, or see that it is still large enough, by a product of such an exponent with x."""
        if self.exponent is not None and size + SMALLEST < self.exponent + self._room:
            return  # without another look at x
        relative = size - _exponent(vectors.longest(_largest(x)))
        if self.exponent is None:
            self.exponent = relative if abs(relative) > self._ordinary else 0
        elif relative > self.exponent + self._room:
            before, self.exponent = self.exponent, relative
            raise Outgrown(
                f"products with {self.name} grew from about 2^{before} to 2^{relative} times the vectors, too much for numbers "
                "of one run; start from another vector (v0=, seed=)"
            )


def sized(multiply: Matmul) -> Callable[[Tensor], tuple[Tensor, float]]:
    """A product with its largest magnitude, which shows in one reduction whether it is finite."""

    def product(x: Tensor) -> tuple[Tensor, float]:
        result = multiply(x)
        return result, _largest(result)

    return product


def _largest(x: Tensor) -> float:
    """The largest magnitude of an entry, NaN where one is."""
    return float(torch.maximum(x.amax(), -x.amin())) if x.numel() else 0.0


def _exponent(number: float) -> int:
    """The exponent e with 2^e ≤ number < 2^(e + 1)."""
    return math.frexp(number)[1] - 1

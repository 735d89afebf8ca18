"""Leaves that hold arrays: explicit matrices on parameter space."""

from __future__ import annotations

import hashlib
import math
import uuid
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any, TypeVar

from curvalg.errors import NotFiniteError, OptionError
from curvalg.expr.facts import Facts, LossFacts
from curvalg.expr.node import Expr

Leaf = TypeVar("Leaf", bound="ArrayLeaf")
History = tuple[str, tuple[tuple[str, Fraction], ...]]


class ArrayLeaf(Expr):
    """A matrix given by arrays (torch tensors or NumPy arrays).

    Leaves compare by a token made at construction, which pickling keeps: comparing the arrays would be slow and, on
    equal numbers from different origins, misleading. Arrays are copied, so that a leaf stays what it is when they are written
    into afterwards.
    """

    def __init__(self) -> None:
        self.token = uuid.uuid4().hex
        self.history = None
        self.origin = None

    token: str
    _facts: Facts
    history: History | None
    """For a leaf that :meth:`derived` made, the operation and its operands by their tokens."""
    origin: Expr | None
    """The expression that a derived leaf equals, where more is known of that than of the arrays."""

    @classmethod
    def derived(
        cls: type[Leaf],
        arrays: Sequence[Any],
        operation: str,
        operands: Iterable[tuple[str, Fraction]],
        origin: Expr | None = None,
        **options: Any,
    ) -> Leaf:
        """The array leaf that results from an exact operation on other leaves.

        Its token follows from the operation and the operands, so that doing the same again gives an equal leaf.

        Args:
            arrays: what the class is made from.
            operation: the name of the operation.
            operands: tokens of the operands and their coefficients, in an order that is theirs alone.
            origin: the expression that the leaf equals, to keep what is known of it.
            options: what the class is made with beside arrays.
        """
        history = (operation, tuple(operands))
        words = [cls.__name__, operation, *(f"{token}*{coefficient}" for token, coefficient in history[1])]
        leaf = cls(*arrays, **options)
        token = hashlib.sha256("\0".join(words).encode()).hexdigest()[:32]
        leaf.__dict__.update(token=token, history=history, origin=origin)
        return leaf

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__:
            raise AttributeError(f"expressions are immutable; cannot set {name!r}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"expressions are immutable; cannot delete {name!r}")

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.token == getattr(other, "token", None)

    def __hash__(self) -> int:
        return hash(self.token)

    def _remembered(self, find: Callable[[], Facts]) -> Facts:
        # Looking at all entries takes time, and facts are asked for at every step of a simplification.
        if "_facts" not in self.__dict__:
            self._facts = find()
        return self._facts

    @property
    def size(self) -> int:
        """Number of rows (and columns)."""
        raise NotImplementedError

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The arrays of the leaf."""
        raise NotImplementedError

    @property
    def numbers(self) -> tuple[Any, ...]:
        """The arrays of the leaf but those that only say where its numbers lie."""
        return self.arrays

    def describe(self) -> str:
        """The description that stands in ``Name<...>`` when the leaf is printed."""
        return f"{self.size}, {_dtype(self.arrays[0])}"


def _dtype(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def _array(value: Any, what: str, *ndims: int) -> Any:
    if not all(hasattr(value, name) for name in ("ndim", "shape", "dtype")):
        raise OptionError(f"{what} must be a torch tensor or a NumPy array, got {type(value).__name__}")
    if hasattr(value, "mask") and hasattr(value, "filled"):  # NumPy's masked arrays
        raise OptionError(f"{what} must be plain numbers, got a masked array; fill the masked entries with .filled(0)")
    if "complex" in str(value.dtype):
        raise OptionError(f"{what} must be real, got dtype {value.dtype}")
    if value.ndim not in ndims:
        expected = " or ".join(f"{n}-d" for n in ndims)
        raise OptionError(f"{what} must be {expected}, got shape {tuple(value.shape)}")
    _require_finite(value, what)
    return value.clone() if hasattr(value, "clone") else value.copy()


def _detached(array: Any) -> Any:
    """The array without its graph: torch warns where a number is taken of one that requires gradients."""
    return array.detach() if hasattr(array, "detach") else array


def _require_finite(value: Any, what: str) -> None:
    """Raise where an array has NaN or infinite entries: its products would be NaN, and solves stall, far from here."""
    if "float" not in str(value.dtype) or not math.prod(value.shape):
        return
    if getattr(value, "is_meta", False):  # it has no numbers, only a shape
        return
    value = _detached(value)
    extremes = value.min(), value.max()  # NaN where an entry is, of torch and of NumPy, and nothing of its size is made
    if all(math.isfinite(extreme) for extreme in extremes):
        return
    raise NotFiniteError(
        f"{what} must be finite, but has NaN or infinite entries; look at what it was computed from, or replace them, as with "
        "torch.nan_to_num"
    )


def _square(value: Any, what: str, *ndims: int) -> Any:
    value = _array(value, what, *(ndims or (2,)))
    if value.shape[-2] != value.shape[-1]:
        raise OptionError(f"{what} must be square, got shape {tuple(value.shape)}")
    return value


def _permutation(value: Any, size: int) -> Any:
    value = _array(value, "order", 1)
    numbers = value[value.argsort()]
    right = len(value) == size and (not size or (numbers[0] == 0 and bool((numbers[1:] - numbers[:-1] == 1).all())))
    if not right:
        raise OptionError(f"order is a permutation of the numbers from 0 to {size - 1}, got {len(value)} numbers")
    return value


_PRECISION = {"float64": 2.3e-16, "float32": 1.2e-7, "float16": 1e-3, "bfloat16": 8e-3}


def _symmetric(matrix: Any) -> bool:
    """Whether a matrix equals its transpose up to rounding: H Hᵀ as BLAS computes it often does not to the last bit."""
    matrix = _detached(matrix)
    transposed = matrix.swapaxes(-1, -2)
    if bool((matrix == transposed).all()):
        return True
    allowed = 8 * _PRECISION.get(_dtype(matrix), 0.0) * float(abs(matrix).max())
    return bool(float(abs(matrix - transposed).max()) <= allowed)


def _facts_of_values(values: Any) -> Facts:
    psd = bool((values >= 0).all())
    return Facts(symmetric=True, psd=psd, positive_definite=bool((values > 0).all()))


class Diagonal(ArrayLeaf):
    """Diagonal matrix diag(values) on the parameters.

    Args:
        values: shape (D,), in the flat layout of the parameters.

    >>> import numpy as np
    >>> print(Diagonal(np.ones(3)))
    Diagonal<3, float64>
    """

    def __init__(self, values: Any) -> None:
        super().__init__()
        self.values = _array(values, "values", 1)

    @property
    def size(self) -> int:
        return int(self.values.shape[0])

    @property
    def arrays(self) -> tuple[Any, ...]:
        return (self.values,)

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return self._remembered(lambda: _facts_of_values(self.values))


class Kronecker(ArrayLeaf):
    """Kronecker product F₁ ⊗ F₂ ⊗ …, row-major: for a weight matrix V, (B ⊗ A) vec(V) = vec(B V Aᵀ).

    Args:
        factors: square matrices, the output factor first; or stacks (G, n, n) of as many, which make G products one below the
            other on the diagonal, as for the groups of a convolution.
        order: a permutation (D,) where the numbers do not lie in the order of the products: x[order] does. None: they do.

    >>> import numpy as np
    >>> print(Kronecker(np.eye(2), np.eye(3)))
    Kronecker<2 x 3, float64>
    >>> print(Kronecker(np.ones((4, 2, 2)), np.ones((4, 3, 3))))
    Kronecker<4 of 2 x 3, float64>
    """

    def __init__(self, *factors: Any, order: Any = None) -> None:
        super().__init__()
        if not factors:
            raise OptionError("Kronecker() needs at least one factor")
        self.factors = tuple(_square(factor, f"Kronecker factor {i}", 2, 3) for i, factor in enumerate(factors))
        stacks = {factor.shape[:-2] for factor in self.factors}
        if len(stacks) > 1:
            raise OptionError(
                "Kronecker factors are matrices, or stacks of as many matrices each, got the shapes "
                f"{', '.join(str(tuple(factor.shape)) for factor in factors)}"
            )
        self.count = next(iter(stacks.pop()), None)
        self.order = None if order is None else _permutation(order, self.size)

    count: int | None
    """The number of products on the diagonal, where the factors are stacks."""

    @property
    def size(self) -> int:
        size = 1 if self.count is None else self.count
        for factor in self.factors:
            size *= int(factor.shape[-1])
        return size

    @property
    def plain(self) -> bool:
        """Whether it is one product, whose numbers lie in its order."""
        return self.count is None and self.order is None

    @cached_property
    def arrangement(self) -> tuple[int | None, str]:
        """A key that is equal for leaves of as many products, whose numbers lie in the same order."""
        if self.order is None:
            return self.count, ""
        order: Any = self.order
        array = order.detach().cpu().numpy() if hasattr(order, "detach") else order
        return self.count, hashlib.sha256(array.tobytes()).hexdigest()

    @property
    def arrays(self) -> tuple[Any, ...]:
        return self.factors if self.order is None else (*self.factors, self.order)

    @property
    def numbers(self) -> tuple[Any, ...]:
        return self.factors

    def describe(self) -> str:
        stacked = "" if self.count is None else f"{self.count} of "
        return f"{stacked}{' x '.join(str(f.shape[-1]) for f in self.factors)}, {_dtype(self.factors[0])}"

    def facts(self, loss: LossFacts | None = None) -> Facts:
        if self.origin is not None and (known := self.origin.facts(loss)).symmetric:
            return known
        return self._remembered(lambda: Facts(symmetric=True if all(map(_symmetric, self.factors)) else None))


class LowRank(ArrayLeaf):
    """Low-rank matrix left · core · rightᵀ.

    Args:
        left: shape (D, r).
        core: shape (r, r), or (r,) for a diagonal one; None for the identity.
        right: shape (D, r); None for ``left``.

    >>> import numpy as np
    >>> print(LowRank(np.ones((5, 2))))
    LowRank<5, rank 2, float64>
    """

    def __init__(self, left: Any, core: Any = None, right: Any = None) -> None:
        super().__init__()
        self.left = _array(left, "left", 2)
        rank = left.shape[1]
        self.core = None if core is None else _array(core, "core", 1, 2)
        self.right = None if right is None else _array(right, "right", 2)
        if core is not None and any(n != rank for n in core.shape):
            raise OptionError(f"core must be ({rank},) or ({rank}, {rank}) to fit left, got {tuple(core.shape)}")
        if right is not None and tuple(right.shape) != tuple(left.shape):
            raise OptionError(f"right must have left's shape {tuple(left.shape)}, got {tuple(right.shape)}")

    @property
    def size(self) -> int:
        return int(self.left.shape[0])

    @property
    def arrays(self) -> tuple[Any, ...]:
        return tuple(array for array in (self.left, self.core, self.right) if array is not None)

    def describe(self) -> str:
        return f"{self.size}, rank {self.left.shape[1]}, {_dtype(self.left)}"

    def facts(self, loss: LossFacts | None = None) -> Facts:
        if self.right is not None:
            return Facts()
        if self.core is None:
            return Facts(psd=True)
        if self.core.ndim == 1:
            return Facts(symmetric=True, psd=True if bool((self.core >= 0).all()) else None)
        return self._remembered(lambda: Facts(symmetric=True if _symmetric(self.core) else None))


class Eigenbasis(ArrayLeaf):
    """Matrix with a known eigenbasis: Q diag(values) Qᵀ with an orthogonal Q.

    Args:
        basis: an orthogonal matrix, or a :class:`Kronecker` leaf of orthogonal factors.
        values: shape (D,).

    >>> import numpy as np
    >>> print(Eigenbasis(np.eye(3), np.ones(3)))
    Eigenbasis<3, float64>
    """

    def __init__(self, basis: Any, values: Any) -> None:
        super().__init__()
        self.basis = basis if isinstance(basis, Kronecker) else _square(basis, "basis")
        self.values = _array(values, "values", 1)
        size = basis.size if isinstance(basis, Kronecker) else basis.shape[0]
        if values.shape[0] != size:
            raise OptionError(f"basis has {size} columns but there are {values.shape[0]} values")

    @cached_property
    def digest(self) -> str:
        """A digest of the numbers and dtype of a basis that is an array, equal for equal bases."""
        basis: Any = self.basis
        array = basis.detach().cpu().double().numpy() if hasattr(basis, "detach") else basis
        return hashlib.sha256(f"{_dtype(basis)} {array.shape}".encode() + array.tobytes()).hexdigest()

    @property
    def size(self) -> int:
        return int(self.values.shape[0])

    @property
    def arrays(self) -> tuple[Any, ...]:
        basis = self.basis.arrays if isinstance(self.basis, Kronecker) else (self.basis,)
        return (self.values, *basis)

    @property
    def numbers(self) -> tuple[Any, ...]:
        basis = self.basis.numbers if isinstance(self.basis, Kronecker) else (self.basis,)
        return (self.values, *basis)

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return self._remembered(lambda: _facts_of_values(self.values))

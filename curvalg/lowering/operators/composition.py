"""Linear operators that take tensors as well as arrays, and their lazy sums and products.

Operators of one problem combine as expressions; those of different problems over the same parameters (a test-set Jacobian
times a training-set inverse) are applied one after the other.
"""

from __future__ import annotations

import numbers
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvalg.errors import ExpressionError, ProblemError
from curvalg.expr.node import Expr
from curvalg.lowering.vectors import Space, Vector, largest, numpy_dtype, parse
from curvalg.problem import Layout
from curvalg.tensors.memory import free_memory


class TorchOperator(LinearOperator):  # type: ignore[misc]  # SciPy ships no types
    """A SciPy ``LinearOperator`` whose products are taken by torch.

    Args:
        codomain: of the results.
        domain: of the operands.
    """

    def __init__(self, codomain: Space, domain: Space) -> None:
        self._codomain, self._domain = codomain, domain
        super().__init__(numpy_dtype(domain.dtype), (codomain.size, domain.size))

    @abstractmethod
    def _apply(self, columns: Tensor) -> Tensor:
        """The product with real columns (n, K) of the operator's dtype and device; entries on a device are looked at here."""

    def _sized(self, columns: Tensor) -> tuple[Tensor, float]:
        """The product as of ``_apply`` and its largest magnitude, NaN where an entry is."""
        result = self._apply(columns)
        return result, float(largest(result))

    @property
    def device(self) -> torch.device:
        """The device on which products are computed."""
        return self._domain.device

    @property
    def layout(self) -> Layout | None:
        """The layout of the vectors it acts on; None for operators on outputs."""
        return self._domain.layout

    # -- products -------------------------------------------------------------------------------------------------------

    def _product(self, x: Vector) -> Any:
        operand = parse(x, self._domain, self._codomain, unread=True)
        if operand.columns.shape[1] == 0:
            return operand.restore(operand.columns.new_zeros(self._codomain.local, 0))
        return operand.restore(self._apply(operand.columns))

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._product(np.asarray(x).reshape(-1))  # type: ignore[no-any-return]

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        if hasattr(X, "toarray"):  # a SciPy sparse operand: its columns are dense here anyway
            X = X.toarray()
        return self._product(np.asarray(X))  # type: ignore[no-any-return]

    def to_dense(self) -> Tensor:
        """The matrix, shape ``op.shape``, on the operator's device.

        Raises:
            ProblemError: it does not fit into the memory that is free.
            ExpressionError: each process holds a part of the vectors only.
        """
        self._require_whole()
        self._require_memory()
        rows, columns = self.shape
        result = torch.empty(rows, columns, dtype=self._domain.dtype, device=self.device)
        for start in range(0, columns, 64):
            width = min(64, columns - start)
            unit = torch.zeros(columns, width, dtype=result.dtype, device=self.device)
            unit[torch.arange(start, start + width, device=self.device), torch.arange(width, device=self.device)] = 1
            result[:, start : start + width] = self._apply(unit)
        return result

    def _require_whole(self) -> None:
        if not (self._domain.vectors.whole and self._codomain.vectors.whole):
            raise ExpressionError(
                f"this needs whole vectors, but each process holds a part of those of a matrix of shape {self.shape}; use "
                "products, solves and estimators, or a Problem whose model is not sharded"
            )

    def _require_memory(self) -> None:
        rows, columns = self.shape
        need, free = rows * columns * self._domain.dtype.itemsize, free_memory(self.device)
        if need > free:
            raise ProblemError(
                f"the dense matrix of shape {self.shape} needs {need / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB are free; "
                "use products, or restrict() to fewer parameters"
            )

    # -- algebra --------------------------------------------------------------------------------------------------------

    def __add__(self, other: Any) -> Any:
        return LazySum([(1.0, self), (1.0, other)]) if isinstance(other, TorchOperator) else super().__add__(other)

    def __radd__(self, other: Any) -> Any:
        return self if type(other) is int and other == 0 else NotImplemented  # where Python's sum() starts

    def __sub__(self, other: Any) -> Any:
        return LazySum([(1.0, self), (-1.0, other)]) if isinstance(other, TorchOperator) else super().__sub__(other)

    def __neg__(self) -> TorchOperator:
        return LazySum([(-1.0, self)])

    def dot(self, x: Any) -> Any:
        """The product with an operator, a number or a vector: ``op @ x``, ``op * x`` and ``op(x)``."""
        if isinstance(x, (TorchOperator, Expr)) or is_real_scalar(x):
            return self._composed(x)
        if isinstance(x, (LinearOperator, numbers.Number)):
            return super().dot(x)
        if isinstance(x, (list, tuple)) and not any(isinstance(t, Tensor) for t in x):
            x = np.asarray(x)
        return self._product(x)

    def _composed(self, other: Any) -> Any:
        """The operator of the product with an operator, an expression or a number."""
        if isinstance(other, Expr):
            raise ExpressionError(
                f"{self!r} is of several problems; lower {other} on one of them, and multiply by that"
            )
        return LazyProduct(self, other) if isinstance(other, TorchOperator) else LazySum([(float(other), self)])

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, numbers.Number):
            raise ExpressionError("@ multiplies by a vector or an operator; write op * number")
        return self.dot(other)

    def __mul__(self, other: Any) -> Any:
        return self.dot(other)

    def __rmul__(self, other: Any) -> Any:
        if is_real_scalar(other):
            return self.dot(other)
        if isinstance(other, Tensor):
            return (self.T @ other.T).T if other.ndim == 2 else self.T @ other
        return super().__rmul__(other)

    def __rmatmul__(self, other: Any) -> Any:
        if isinstance(other, Tensor):
            return self.__rmul__(other)
        return super().__rmatmul__(other)

    def __truediv__(self, other: Any) -> TorchOperator:
        return LazySum([(1 / float(other), self)])


def is_real_scalar(x: Any) -> bool:
    """Whether x is a real number, or a tensor that holds one."""
    return (isinstance(x, numbers.Real) and not isinstance(x, bool)) or (isinstance(x, Tensor) and x.ndim == 0)


class LazyProduct(TorchOperator):
    """The product ``left @ right``, applied one after the other.

    Raises:
        ExpressionError: the vectors between them are not laid out alike.
    """

    def __init__(self, left: TorchOperator, right: TorchOperator) -> None:
        _require_same(left._domain, right._codomain, f"cannot multiply {left!r} @ {right!r}")
        self.left, self.right = left, right
        super().__init__(left._codomain, right._domain)

    def _apply(self, columns: Tensor) -> Tensor:
        return self.left._apply(self.right._apply(columns))

    def _adjoint(self) -> TorchOperator:
        return LazyProduct(self.right.T, self.left.T)

    _transpose = _adjoint

    def __repr__(self) -> str:
        return f"{self.left!r} @ {self.right!r}"


class LazySum(TorchOperator):
    """A lazy sum Σ cᵢ Aᵢ of operators.

    Raises:
        ExpressionError: the operators act between differently laid out vectors.
    """

    def __init__(self, parts: Sequence[tuple[float, TorchOperator]]) -> None:
        self.parts = list(parts)
        (_, first), *rest = self.parts
        for _, other in rest:
            message = f"cannot add {first!r} and {other!r}"
            _require_same(first._codomain, other._codomain, message)
            _require_same(first._domain, other._domain, message)
        super().__init__(first._codomain, first._domain)

    def _apply(self, columns: Tensor) -> Tensor:
        (c, first), *rest = self.parts
        total = c * first._apply(columns)
        for c, part in rest:
            total = total.add_(part._apply(columns), alpha=c)
        return total

    def _adjoint(self) -> TorchOperator:
        return LazySum([(c, part.T) for c, part in self.parts])

    _transpose = _adjoint

    def __repr__(self) -> str:
        return "(" + " + ".join(f"{c:g} * {part!r}" for c, part in self.parts) + ")"


def _require_same(a: Space, b: Space, what: str) -> None:
    names = [None if space.layout is None else dict(space.layout.shapes) for space in (a, b)]
    if (a.size, a.vectors.pieces) != (b.size, b.vectors.pieces) or names[0] != names[1]:
        raise ExpressionError(
            f"{what}: the vectors between them differ, {_describe(a)} and {_describe(b)}; problems must share names and shapes "
            "of their parameters (params=)"
        )
    if (a.dtype, a.device) != (b.dtype, b.device):
        raise ExpressionError(f"{what}: one is {a.dtype} on {a.device}, the other {b.dtype} on {b.device}")


def _describe(space: Space) -> str:
    return f"{space.size} outputs" if space.layout is None else repr(space.layout)

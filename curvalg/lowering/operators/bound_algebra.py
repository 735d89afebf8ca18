"""The algebra of operators of one problem: they combine as expressions, so that sums stay fused."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self, TypeAlias, TypeGuard

from scipy.sparse.linalg import LinearOperator

from curvalg.errors import ExpressionError
from curvalg.expr.node import Expr
from curvalg.lowering.inverses.preconditioners import has_inverse
from curvalg.lowering.operators.composition import TorchOperator, is_real_scalar
from curvalg.problem import Problem, Snapshot

Preconditioner: TypeAlias = Expr | LinearOperator | Callable[..., Any] | None


class BoundAlgebra(TorchOperator):
    """An expression at a state of a problem, which adds and multiplies with others of that problem."""

    expr: Expr
    problem: Problem
    preconditioner: Preconditioner
    snapshot: Snapshot

    @abstractmethod
    def _combine(self, expr: Expr, *others: BoundAlgebra) -> Self:
        """The operator of an expression made of this one's and of others', all at the state that they share."""

    @abstractmethod
    def _current(self) -> None:
        """Raise StaleError where what products are computed from has moved since."""

    def _adjoint(self) -> Self:
        return self._combine(self.expr.T)

    _transpose = _adjoint

    def _same(self, other: object) -> TypeGuard[BoundAlgebra]:
        return isinstance(other, BoundAlgebra) and other.problem is self.problem

    def __add__(self, other: Any) -> Any:
        if self._same(other):
            return self._combine(self.expr + other.expr, other)
        return super().__add__(other) if isinstance(other, LinearOperator) else self._combine(self.expr + other)

    def __sub__(self, other: Any) -> Any:
        if self._same(other):
            return self._combine(self.expr - other.expr, other)
        return super().__sub__(other) if isinstance(other, LinearOperator) else self._combine(self.expr - other)

    def __neg__(self) -> Self:
        return self._combine(-self.expr)

    def __pow__(self, exponent: int) -> Self:
        return self._combine(self.expr**exponent)

    def _composed(self, other: Any) -> Any:
        if self._same(other):
            return self._combine(self.expr @ other.expr, other)
        if isinstance(other, Expr):
            return self._combine(self.expr @ other)
        return self._combine(self.expr * other) if is_real_scalar(other) else super()._composed(other)

    def __truediv__(self, other: Any) -> Self:
        return self._combine(self.expr / (other.expr if isinstance(other, BoundAlgebra) else other))

    def __repr__(self) -> str:
        return f"<{self.shape[0]}x{self.shape[1]} {type(self).__name__} {self.expr}, {self.dtype} on {self.device}>"


def joint_preconditioner(expr: Expr, operators: list[BoundAlgebra]) -> Preconditioner:
    """The preconditioner of an expression put together from operators."""
    if not has_inverse(expr):
        return None
    given = [op.preconditioner for op in operators if has_inverse(op.expr)]
    if any(p is not given[0] for p in given):
        raise ExpressionError(
            "the operators have inverses with different preconditioners; name them in the expressions, "
            "inverse(..., preconditioner=...), and combine those"
        )
    return given[0] if given else None

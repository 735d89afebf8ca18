"""What is known of a matrix beyond its products: exact quantities, the arrays that it is made of, the dense matrix."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from curvalg.errors import ExpressionError, OptionError
from curvalg.expr.node import Expr
from curvalg.lowering.inverses.forms import find
from curvalg.lowering.inverses.offer import BoundMatrix, Form
from curvalg.lowering.matrices import DenseMatrix
from curvalg.lowering.operators.bound_algebra import BoundAlgebra
from curvalg.lowering.plans.block_view import MatrixBlock, matrix_blocks
from curvalg.lowering.plans.explicit import explicit
from curvalg.lowering.plans.plan import Plan
from curvalg.lowering.plans.planner import plan
from curvalg.lowering.vectors import require_finite
from curvalg.runs.provenance import identity, remember

Quantity: TypeAlias = Literal["trace", "diagonal", "logdet", "eigh"]


class StructuredOperator(BoundAlgebra):
    """An expression at a state of a problem, with all that its structure tells."""

    _resolved: Expr
    _plan: Plan

    @abstractmethod
    def _together(self) -> AbstractContextManager[None]:
        """A context around what all processes of the problem do together."""

    @abstractmethod
    def _bind(self) -> None:
        """Make the matrices that need a pass over the data, once."""

    def exact(self, quantity: Quantity) -> Any | None:
        """A quantity of the matrix that its structure gives exactly, or None.

        Structured are diagonals, Kronecker products, eigenbases, low-rank updates, blocks of these, sums of terms with few
        output directions (through their Gram matrix), inverses and square roots of all these, each damped or not, and
        matrices of at most 4096 rows.

        Args:
            quantity: "trace" (a float); "diagonal" (a tensor (D,)); "logdet", log |det A|; or "eigh", an
                :class:`~curvalg.Eigh` with all eigenvalues, whose eigenvectors are made when asked for. Through a Gram
                matrix, eigenvalues below its rounding noise (in the problem's precision) count among the rest. All
                eigendecompositions are made in float64, whatever the precision of the problem, and rounded to it afterwards.

        Raises:
            ExpressionError: an unknown quantity.

        >>> import torch
        >>> from curvalg import Identity, Problem, registry
        >>> problem = Problem(torch.nn.Linear(8, 3), torch.nn.MSELoss(), (torch.eye(4, 8), torch.zeros(4, 3)))
        >>> op = (registry.build("ggn") + 0.5 * Identity).lower(problem)
        >>> pairs = op.exact("eigh")
        >>> pairs.eigenvalues.shape, pairs.rest, pairs.multiplicity
        (torch.Size([12]), 0.5, 15)
        """
        if quantity not in (known := get_args(Quantity)):
            raise OptionError(f"exact() answers {', '.join(known)}; got {quantity!r}")
        with self._together(), self.problem.lock:
            self._current()
            form = self._form()
            if form is None:
                return None
            with self.problem.differentiating():
                return getattr(form.at(self.snapshot), quantity)()

    def exact_rows(self, quantity: Quantity = "eigh") -> int | None:
        """The rows of the matrix that :meth:`exact` would build and factorise: what it costs, in products.

        Returns:
            Rows of the dense or the Gram matrix, or columns whose squares are summed; 0 where the structure is there already,
            and for inverses and square roots, where the first product makes it; None where there is no exact form.
        """
        with self._together(), self.problem.lock:
            form = self._form()
        if form is None:
            return None
        return form.diagonal_rows if quantity in ("trace", "diagonal") else form.rows

    def _form(self) -> Form | None:
        if self.expr.domain != self.expr.codomain or self.expr.domain_params != self.expr.codomain_params:
            return None
        if self.problem.group.sharded:  # structures are of whole matrices
            return None
        with self.problem.differentiating():
            self._bind()
            return find(BoundMatrix(self._resolved, self.problem, plan))[0]

    def to_dense(self) -> Tensor:
        with self._together(), self.problem.differentiating(), self.problem.lock:
            self._require_whole()
            self._require_memory()
            self._current()
            self._bind()
            if self.expr.domain == self.expr.codomain == "outputs":
                form, _ = find(BoundMatrix(self._resolved, self.problem, plan), asked="kernel")
                if form is not None and isinstance(structure := form.at(self.snapshot), DenseMatrix):
                    return structure.matrix.to(self.problem.dtype)
            if (matrix := self._plan.dense(self.snapshot)) is not None:
                return require_finite(matrix, self.expr)
            return super().to_dense()

    to_dense.__doc__ = BoundAlgebra.to_dense.__doc__

    @property
    def structure(self) -> tuple[MatrixBlock, ...]:
        """The arrays that a matrix on parameters is made of, block by block: see :class:`~curvalg.MatrixBlock`.

        Raises:
            ExpressionError: it acts on outputs, or is known by its products alone and too large to be built.
        """
        with self._together(), self.problem.lock, self.problem.differentiating():
            matrix = self._arrays_of("structure")
            return matrix_blocks(matrix, self.snapshot)

    def bound_expression(self) -> Expr:
        """The expression with arrays in the place of all that was computed here; see :meth:`curvalg.Expr.bound`."""
        with self._together(), self.problem.lock, self.problem.differentiating():
            matrix = self._arrays_of("bound")
            made = explicit(matrix, self.snapshot)
            remember(made, identity(self.problem, self.snapshot))
            return made

    def _arrays_of(self, what: str) -> BoundMatrix:
        self._require_whole()
        if {self.expr.domain, self.expr.codomain} != {"parameters"}:
            raise ExpressionError(
                f"{what}: expected a matrix on parameters, but {self.expr} is {self.expr.domain} -> {self.expr.codomain}"
            )
        self._current()
        with self.problem.differentiating():
            self._bind()
        return BoundMatrix(self._resolved, self.problem, plan)

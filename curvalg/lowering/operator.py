"""The operator that users of SciPy and PyTorch see."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import astuple, replace
from typing import Any

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvalg.errors import ConvergenceError, CurvalgWarning, ExpressionError, NotFiniteError, OptionError, VectorError
from curvalg.expr.facts import Facts
from curvalg.expr.node import Expr, require_hashable, too_deep
from curvalg.expr.term import needs_model
from curvalg.lowering.blocks.chosen_entries import part_layout
from curvalg.lowering.blocks.complete_blocks import resolve
from curvalg.lowering.blocks.output_rows import output_sizes
from curvalg.lowering.explain import explain, operator_card
from curvalg.lowering.inverses.preconditioners import has_inverse, preconditioned
from curvalg.lowering.inverses.rounding import noise
from curvalg.lowering.operators.bound_algebra import BoundAlgebra, Preconditioner, joint_preconditioner
from curvalg.lowering.operators.planned_operator import PlannedOperator
from curvalg.lowering.operators.third_order import form_gradient, terms_of
from curvalg.lowering.plans.algebra_plan import SumPlan
from curvalg.lowering.plans.bind import bind, unbound
from curvalg.lowering.plans.inverse_plan import InversePlan
from curvalg.lowering.plans.owned_plan import OwnedPlan
from curvalg.lowering.plans.plan import Plan
from curvalg.lowering.plans.planner import plan
from curvalg.lowering.replayed import Repeatable, Replayed, replayed
from curvalg.lowering.vectors import (
    Measure,
    Space,
    Vector,
    first_column,
    largest,
    measured,
    parse,
    require_finite_operand,
)
from curvalg.problem import Problem, Snapshot
from curvalg.rewrite import Step, simplify
from curvalg.runs.checkpoint import Checkpoint
from curvalg.runs.run_file import require_place
from curvalg.runs.run_identity import run_identity
from curvalg.runs.solve_file import FileTrail
from curvalg.solve import SolveResult
from curvalg.solve.trail import Trail


class CurvatureOperator(PlannedOperator):
    """A curvature expression bound to a problem: a SciPy ``LinearOperator`` computed by torch.

    Made by :meth:`curvalg.Expr.lower`. ``op @ x`` takes a NumPy array, a tensor on the problem's device, or a dict or list
    of tensors in parameter layout, each with or without a trailing column axis, and returns the same kind, detached.
    Operators of one problem add, scale and multiply as expressions, so that sums stay fused; with other
    ``LinearOperator`` objects SciPy's own lazy arithmetic applies. Products are those of the model as it was when
    lowered; if anything that :class:`~curvalg.Problem` watches changed since (parameters, buffers, attributes, hooks, the loss,
    data in memory), they raise :class:`~curvalg.StaleError`, and :meth:`refresh` takes it anew.

    Attributes:
        expr: the expression as written.
        problem: the problem.
        preconditioner: for iterative inverses that name none.
        shape: (rows, columns).
        dtype: NumPy dtype of products with arrays of the same dtype.

    >>> import numpy as np, torch
    >>> from curvalg import Identity, Problem, registry
    >>> data = (torch.randn(6, 3), torch.randn(6, 1))
    >>> problem = Problem(torch.nn.Linear(3, 1), torch.nn.MSELoss(), data)
    >>> op = (registry.build("ggn") + 1e-3 * Identity).lower(problem)
    >>> op.shape, (op @ np.ones(4, np.float32)).dtype, (op @ torch.ones(4, 2)).shape
    ((4, 4), dtype('float32'), torch.Size([4, 2]))
    """

    def __init__(self, expr: Expr, problem: Problem, preconditioner: Preconditioner = None) -> None:
        if preconditioner is not None and not has_inverse(expr):
            raise ExpressionError(f"a preconditioner is for inverses, but {expr} has none; leave it out")
        if not (
            preconditioner is None or isinstance(preconditioner, (Expr, LinearOperator)) or callable(preconditioner)
        ):
            raise OptionError(
                "a preconditioner is an expression, a LinearOperator or a function v -> P⁻¹ v, got "
                f"{type(preconditioner).__name__}"
            )
        self.expr = expr
        self.problem = problem
        self.preconditioner = preconditioner
        with problem.lock, problem.together(expr):
            self.snapshot: Snapshot = problem.snapshot()
            _ = problem.totals  # counts the data once, so that facts and denominators are known
            if not problem.group.alone:
                problem.group.agree({"the expression": str(expr)}, "lower the same expression on all ranks")
            self._lower()
        super().__init__(self._codomain, self._domain)

    def _lower(self) -> None:
        self._needs_model = needs_model(self.expr) or self.preconditioner is not None
        self._steps: list[Step] = []
        self._multiplied = False
        given = self.preconditioner
        expr = preconditioned(self.expr, given) if isinstance(given, Expr) else self.expr
        self._given = None if isinstance(given, Expr) else given
        self._simplified = self._simplify(expr)
        self._resolved = self._resolve(self._simplified)
        self._plan: Plan = plan(self._resolved, self.problem, self._given)
        self._repeated: Repeatable = replayed(self.problem, self._plan)
        self._bound = not unbound(self._resolved)
        self._domain = self._space(self.expr.domain, self.expr.domain_params)
        self._codomain = self._space(self.expr.codomain, self.expr.codomain_params)

    def _simplify(self, expr: Expr) -> Expr:
        rewritten = simplify(expr, self.problem.facts)
        self._steps += rewritten.steps
        return rewritten.expr

    def _resolve(self, expr: Expr) -> Expr:
        """Give all blocks full names, and apply the laws that hold only then."""
        resolved = resolve(expr, self.problem)
        return resolved if resolved == expr else simplify(resolved, self.problem.facts).expr

    def _space(self, name: str | None, params: tuple[str, ...] | None) -> Space:
        problem = self.problem
        if name == "outputs":
            return Space(output_sizes(problem, self.snapshot).total, None, problem.dtype, problem.device)
        if not problem.group.sharded:
            layout = problem.layout if params is None else part_layout(problem, params)
            return Space(layout.size, layout, problem.dtype, problem.device)
        restricted = problem if params is None else problem.restricted(params)
        vectors = restricted.vectors
        return Space(vectors.size, restricted.layout, problem.dtype, problem.device, vectors)

    # -- what is known --------------------------------------------------------------------------------------------------

    @property
    def facts(self) -> Facts:
        """The symmetry and definiteness, given the loss; True, False or None (unknown)."""
        # What a matrix term declares is no longer seen in the arrays that it became.
        declared, found = (expr.facts(self.problem.facts) for expr in (self.expr, self._resolved))
        pairs = zip(astuple(declared), astuple(found), strict=True)
        return Facts(*(b if a is None else a for a, b in pairs))

    def explain(self) -> str:
        """A report on what became of the expression: laws that applied, the plan, routes and what is kept."""
        with self.problem.lock:
            return explain(self)

    def _repr_html_(self) -> str:
        with self.problem.lock:
            return operator_card(self)

    def _current(self, unread: list[Tensor] | None = None) -> None:
        """Raise StaleError where what products are computed from has moved; arrays do not."""
        if self._needs_model:
            self.problem.check(self.snapshot, unread)

    # -- life -----------------------------------------------------------------------------------------------------------

    def prepare(self) -> CurvatureOperator:
        """Make now the passes over the data that the first product would make; returns the operator itself."""
        with self._together(), self.problem.differentiating():
            self._current()
            self._bind()
            self._plan.prepare(self.snapshot)
        return self

    def _bind(self) -> None:
        """Make the matrices that need a pass over the data, and plan again with them."""
        if self._bound:
            return
        with self.problem.lock:
            if self._bound:  # by another thread, meanwhile
                return
            bound = bind(self._resolved, self.problem, self.snapshot, plan)
            self._simplified = self._simplify(bound)
            self._resolved = self._resolve(self._simplified)
            self._plan = plan(self._resolved, self.problem, self._given)
            self._repeated = replayed(self.problem, self._plan)
            self._bound = True

    def refresh(self) -> CurvatureOperator:
        """Take model, loss and data as they are now (see :meth:`curvalg.Problem.refresh`); returns the operator itself."""
        problem = self.problem
        with problem.lock, problem.together(self.expr):
            if self.snapshot is problem.snapshot():  # nothing that is watched has changed, so it is something else
                problem.refresh()
            self.snapshot = problem.snapshot()
            _ = problem.totals
            self._lower()
        return self

    def close(self) -> None:
        """Release what the problem keeps between products (statistics and matrices are made again when needed)."""
        self.problem.close()
        if not self._bound or unbound(self.expr):
            self._lower()

    def __reduce__(self) -> tuple[Any, ...]:
        # Snapshots are of a live process: a restored operator is lowered at the restored model's state.
        if self._bound and unbound(self.expr):
            warnings.warn(
                f"a pickle of {self.expr} holds the expression, the model and the data, but not the matrices that were "
                "computed; they are computed again at the first product. curvalg.save(operator, path) writes the matrices",
                CurvalgWarning,
                stacklevel=2,
            )
        return CurvatureOperator, (self.expr, self.problem, self.preconditioner)

    # -- products -------------------------------------------------------------------------------------------------------

    def _together(self) -> AbstractContextManager[None]:
        return self.problem.together(self.expr)

    def _product(self, x: Vector) -> Any:
        with self._together():
            try:
                return super()._product(x)
            except VectorError:
                # An operand for the device that the model has moved to is right; the operator is of an earlier state.
                self._current()
                raise

    def _apply(self, columns: Tensor) -> Tensor:
        with self._together():
            return self._measured(columns, torch.sum)[0]

    def _sized(self, columns: Tensor) -> tuple[Tensor, float]:
        with self._together():
            return self._measured(columns, largest)

    def _measured(self, columns: Tensor, measure: Measure) -> tuple[Tensor, float]:
        # On a device the first product waits for the comparison with the live model; others compute meanwhile.
        unread: list[Tensor] | None = [] if self._multiplied else None
        self._current(unread)
        try:
            with self.problem.differentiating():
                if not self._bound:
                    self._bind()
                result = self._repeated.apply(self.snapshot, columns)
            number, moved = measured(result, columns, unread or (), self.expr, measure)
        except RecursionError as error:
            raise too_deep() from error
        except NotFiniteError:
            for inverse_ in self._inverses():
                inverse_.blame()
            raise
        except Exception as error:  # for which there may be a reason that has not been looked at yet
            if not isinstance(error, ExpressionError):  # what a blamed term wrote is not a change of the user's
                require_finite_operand(columns)
                self._current()
            raise
        if moved:
            self._current()
        self._multiplied = True
        return result, number

    def _combine(self, expr: Expr, *others: BoundAlgebra) -> CurvatureOperator:
        for op in (self, *others):
            op._current()
        return CurvatureOperator(expr, self.problem, joint_preconditioner(expr, [self, *others]))

    def quadratic_form_gradient(self, left: Vector, right: Vector) -> Any:
        """The gradient ∇θ Σₖ lₖᵀ A(θ) rₖ by the chosen parameters, exact: third-order reverse mode.

        For sums of terms that take one pass over the data (hessian, ggn, fisher, residual, covariance), centered_covariance and
        the identity. From it follow gradients of eigenvalues (∂λ = vᵀ ∂A v), of tr A, log det A and the like;
        :mod:`curvalg.differentiable` has them ready, with gradients by all that model and loss depend on. Checked once a state
        by a central difference.

        Args:
            left: l, (D,) or (D, K), of any kind that a product takes.
            right: r, of the same kind and shape.

        Returns:
            A vector (D,), of the kind of ``left``.

        Raises:
            ExpressionError: another kind of expression.
            ProblemError: the model lacks a third derivative, or torch's formula for it is wrong.
            VectorError: vectors that do not fit.

        >>> import torch
        >>> from curvalg import Problem, registry
        >>> problem = Problem(torch.nn.Linear(3, 1), torch.nn.BCEWithLogitsLoss(), (torch.randn(6, 3), torch.ones(6, 1)))
        >>> op = registry.build("hessian").lower(problem)
        >>> op.quadratic_form_gradient(torch.eye(4), torch.eye(4)).shape  # of the trace
        torch.Size([4])
        """
        with self._together():
            return self._form_gradient(left, right)

    def _form_gradient(self, left: Vector, right: Vector) -> Any:
        matrix = terms_of(self.expr)
        self._require_whole()
        self._current()
        one, two = (parse(x, self._codomain, self._domain).columns for x in (left, right))
        if one.shape != two.shape:
            raise VectorError(f"expected left and right of one shape, got {tuple(one.shape)} and {tuple(two.shape)}")
        found = form_gradient(matrix, self.problem, self.snapshot, one, two)
        return parse(first_column(left, self._domain), self._domain, self._domain).restore(found.parameters[:, None])

    # -- inverses -------------------------------------------------------------------------------------------------------

    @property
    def last_solve(self) -> SolveResult | None:
        """The report of the last solve inside a product or :meth:`solve`; None before, and without an inverse."""
        return next((last for node in self._inverses(owned=False) if (last := node.last) is not None), None)

    def _inverses(self, *, owned: bool = True) -> Iterator[InversePlan]:
        """All solves inside the plan, outer ones first, with what they know of the last product.

        Args:
            owned: also those of this process for layers that it owns, where parameters lie in parts.
        """
        if isinstance(self._repeated, Replayed):
            self._repeated.catch_up()
        todo: list[Plan] = [self._plan]
        while todo:
            node = todo.pop(0)
            if isinstance(node, InversePlan):
                yield node
            todo.extend(node.inner if owned or not isinstance(node, OwnedPlan) else ())

    def solve(
        self,
        b: Vector,
        *,
        x0: Vector | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> SolveResult:
        """Solve with an operator A⁻¹ (or c A⁻¹): its product with b, with a report per column.

        Args:
            b: right-hand side(s), of any kind and shape that a product takes.
            x0: a guess of the result, of the same kind and shape; iterative solvers start there.
            checkpoint: a file that an iterative solve is written to now and then and resumed from, if it is there.
            progress: show iterations and the largest residual.

        Returns:
            The result, ``x`` in the kind and shape of b. After Ctrl-C an iterative solve gives its best iterates, with
            ``partial=True``. A direct solve also counts as converged where its residual is above the tolerance, but no more
            than rounding of the products; ``reason`` says so, and more than 1e-2 ‖b‖ is warned of once, where the matrix was
            built by products: it is singular to working precision.

        Raises:
            ExpressionError: the operator is not an inverse.
            CheckpointError: the file is of another run, or damaged.
            ConvergenceError: a column did not reach the tolerance (the best iterates are in ``error.result.x``), unless the
                inverse was made with ``on_fail="warn"``.
        """
        with self._together():
            require_place(checkpoint)  # before anything is computed
            return self._solved(b, x0, checkpoint, progress)

    def _solved(
        self, b: Vector, x0: Vector | None, checkpoint: str | os.PathLike[str] | None, progress: bool
    ) -> SolveResult:
        self._current()
        operand = parse(b, self._domain, self._codomain)
        start = None if x0 is None else parse(x0, self._codomain, self._domain).columns
        if start is not None and start.shape != operand.columns.shape:
            shape, wanted = tuple(start.shape), tuple(operand.columns.shape)
            raise VectorError(f"x0 must have the shape of b, got {shape} for {wanted}")
        with self.problem.differentiating():
            self._bind()
            scale, node = self._inverse_plan()
            start = None if start is None else start / scale
            trail, vectors = Trail(), self._codomain.vectors
            if checkpoint is not None or progress:
                file = None
                if checkpoint is not None:
                    subject = run_identity(self.expr, self.problem, self.snapshot, noise(self.problem))
                    file = Checkpoint(checkpoint, subject, self.problem.measured, vectors=vectors)
                trail = FileTrail(file, node.expr, node.solver.name, operand.columns, start, vectors, progress)
            try:
                result = node.solve(self.snapshot, operand.columns, start, trail)
            except ConvergenceError as error:
                if isinstance(best := error.result, SolveResult):
                    error.result = replace(best, x=operand.restore(scale * best.x))
                raise
            finally:
                trail.close()
        return replace(result, x=operand.restore(scale * result.x))

    def _scaled_inverse(self) -> tuple[float, InversePlan] | None:
        """The number c and the solve of an operator that is c A⁻¹; None where it is none."""
        scale, node = 1.0, self._plan
        if isinstance(node, SumPlan) and len(node.parts) == 1 and not node.shift:
            scale, node = node.parts[0]
        return (scale, node) if isinstance(node, InversePlan) else None

    def _inverse_plan(self) -> tuple[float, InversePlan]:
        found = self._scaled_inverse()
        if isinstance(self._plan, OwnedPlan):
            raise ExpressionError(
                f"solve() reports on whole columns, but {self.expr} is solved by each process for the layers that it owns; use "
                "op @ b"
            )
        if found is None:
            raise ExpressionError(
                f"solve() is for operators that are an inverse, but this one is {self.expr}; use op @ b"
            )
        return found


def bound(expr: Expr, problem: Problem) -> Expr:
    """Arrays of an expression at the present state of a problem; see :meth:`curvalg.Expr.bound`."""
    return lower(expr, problem).bound_expression()


def lower(
    expr: Expr,
    problem: Problem | Any,
    loss: Any = None,
    data: Any = None,
    *,
    preconditioner: Preconditioner = None,
    **options: Any,
) -> CurvatureOperator:
    """Bind an expression to a problem; see :meth:`curvalg.Expr.lower`."""
    require_hashable(expr)
    if not isinstance(problem, Problem):
        if data is None:
            raise ExpressionError(
                f"expected a curvalg.Problem to lower on, got {type(problem).__name__}; write "
                "expr.lower(Problem(model, loss, data)), or expr.lower(model, loss, data)"
            )
        problem = Problem(problem, loss, data, **options)
    elif loss is not None or data is not None or options:
        raise ExpressionError(
            "a Problem has its loss, data and options already; pass it alone, as expr.lower(problem), or change them with "
            "Problem(...) or problem.with_data(...)"
        )
    return CurvatureOperator(expr, problem, preconditioner)

"""Preconditioners given when an expression is lowered: operators and functions that apply P⁻¹."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from curvalg.errors import StaleError, VectorError
from curvalg.expr import Expr, Inverse, inverse
from curvalg.lowering.inverses.solver import Preconditioning
from curvalg.problem import Snapshot
from curvalg.tensors.trees import describe

Given: TypeAlias = LinearOperator | Callable[..., Any] | None
"""Something that applies P⁻¹, or None."""


def given_preconditioner(given: LinearOperator | Callable[..., Any]) -> Preconditioning:
    """A function R (n, K) -> P⁻¹ R, from an operator (as SciPy's ``M``) or a function of one vector (n,)."""

    def apply(_: Snapshot, r: Tensor) -> Tensor:
        if isinstance(given, LinearOperator):
            # A curvature operator takes tensors and keeps them on their device; others take NumPy arrays.
            own = hasattr(given, "problem")
            try:
                result = given @ r if own else torch.from_numpy(given.matmat(r.cpu().numpy()))
            except StaleError as error:
                raise StaleError(
                    f"the preconditioner {given!r} is of an earlier state of the model, loss or data; call its refresh() as "
                    "well, or pass it as an expression, which is lowered with the operator"
                ) from error
            except ValueError as error:
                raise VectorError(f"the preconditioner {given!r} does not fit {tuple(r.shape)}: {error}") from error
        else:
            # A copy each: a function that writes into its argument must not change the residual.
            result = torch.stack([_vector(given(column.clone()), column) for column in r.unbind(1)], 1)
        return result.to(dtype=r.dtype, device=r.device)

    return apply


def _vector(result: Any, like: Tensor) -> Tensor:
    if not isinstance(result, Tensor) or result.shape != like.shape:
        raise VectorError(
            f"the preconditioner must map a tensor {tuple(like.shape)} to its like, got {describe(result)}"
        )
    return result


def has_inverse(expr: Expr) -> bool:
    """Whether there is an inverse in an expression, which a preconditioner may be for."""
    return any(isinstance(node, Inverse) for node in expr.walk())


def preconditioned(expr: Expr, by: Expr) -> Expr:
    """The expression with a preconditioner for every inverse that names none."""
    if isinstance(expr, Inverse):
        return inverse(preconditioned(expr.expr, by), **{**expr.options, "preconditioner": expr.preconditioner or by})
    return expr.rebuild(tuple(preconditioned(child, by) for child in expr.children)) if expr.children else expr

"""Functions of symmetric operators times vectors."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from curvalg.distributed.group import shared_call
from curvalg.errors import ProblemError
from curvalg.estimate.functions.krylov_function import KrylovFunction
from curvalg.estimate.functions.scalar_functions import Scalar, scalar
from curvalg.estimate.proofs import require_symmetric
from curvalg.estimate.request import OnFail, Request, require_count
from curvalg.estimate.result import Result
from curvalg.estimate.target import CHEAP, Basis, Target, target
from curvalg.lowering.matrices import Eigh
from curvalg.lowering.vectors import Vector
from curvalg.runs.run import run
from curvalg.runs.run_file import FileName
from curvalg.solve.powers import norms
from curvalg.tensors.memory import small

Function = Callable[[Tensor], Tensor] | Literal["sqrt", "inv_sqrt", "exp", "log"]

LONGEST = 500
"""Steps after which an automatic run gives up."""
KEPT = 2**28
"""Numbers that the vectors of an automatic run may take together (1 GiB in float32)."""


@dataclass(frozen=True, kw_only=True, repr=False)
class FunctionProduct(Result):
    """The product f(A) v of a function of an operator with vectors.

    Args:
        value: in the kind and shape of v.
        changes: of each column, ‖difference to the approximation of four fifths of the steps‖ / ‖f(A) v‖; 0.0 where it is
            exact. Convergence is at least linear, so the error is smaller in all but pathological cases.
        steps: products with each column.
    """

    value: Any
    changes: Tensor
    steps: int

    @property
    def findings(self) -> dict[str, str]:
        most = float(self.changes.max()) if self.changes.numel() else 0.0
        return {"columns": str(self.changes.numel()), "steps": str(self.steps), "changes": f"≤ {most:.1g}"}


@shared_call
def matrix_function(
    op: Any,
    function: Function,
    vector: Vector,
    *,
    steps: int | Literal["auto"] = "auto",
    tol: float | None = None,
    seed: int = 0,
    on_fail: OnFail = "raise",
    basis: Basis = "device",
    checkpoint: FileName | None = None,
    progress: bool = False,
) -> FunctionProduct:
    """The product of a function of a symmetric operator with vectors, f(A) v.

    f(A) v ≈ ‖v‖ V f(T) e₁, with the orthonormal basis V and the tridiagonal matrix T of m Lanczos steps from v / ‖v‖; all
    columns are advanced by one product. Where the structure of a curvature operator gives all its eigenvectors cheaply, it is
    exact.

    Memory: m vectors of n numbers for each column.

    Args:
        op: a :class:`~curvalg.CurvatureOperator` that is proved symmetric, another SciPy ``LinearOperator`` or a matrix.
        function: "sqrt", "inv_sqrt", "exp", "log", or a function of a float64 tensor of eigenvalues, entry by entry.
        vector: v, of any kind and shape that the operator multiplies.
        steps: m, or "auto" for as many as the tolerance takes, at most 500 and 2²⁸ numbers.
        tol: change relative to ‖f(A) v‖ at which "auto" stops; by default 1e-5 in float32, 1e-10 in float64.
        seed: of the vectors that try the symmetry of operators of which nothing is proved.
        on_fail: "raise", or "warn" and return what there is with ``converged=False``.
        basis: where the Krylov vectors lie: on the "device" of the operator or, where they do not fit there, in the memory of
            the "cpu", which they leave for products only.
        checkpoint: a file that the run is written to now and then and resumed from, if it is there.
        progress: show products done and expected.

    Returns:
        The product, in ``value``. With a given number of steps ``converged`` says whether the tolerance was reached.

    Raises:
        FactsError: the operator is not symmetric, or has Ritz values where the function is not defined.
        ExpressionError: an argument that makes no sense.
        VectorError: v does not fit.
        ProblemError: a product that is not finite, or a result that is out of range.
        ConvergenceError: "auto" did not reach the tolerance; the product as it is then is in ``error.result``.

    Source: Golub and Meurant, Matrices, Moments and Quadrature with Applications (2010).

    >>> import torch
    >>> A = torch.diag(torch.tensor([1.0, 4.0, 9.0]))
    >>> matrix_function(A, "sqrt", torch.ones(3)).value.round(decimals=3)
    tensor([1., 2., 3.])
    """
    request = Request(seed, checkpoint, progress, on_fail, tol)
    begin, given, f = time.perf_counter(), target(op, basis).in_units(), scalar(function)
    steps = steps if steps == "auto" else require_count(steps, "steps")
    default = 1e-5 if given.space.dtype == torch.float32 else 1e-10
    tol = max(default, given.half) if tol is None else float(tol)
    file = given.checkpoint(checkpoint)
    before = require_symmetric(given, seed)
    rows = (operand := given.operand(vector)).columns.T.contiguous()
    kept = given.vectors.anywhere(rows.T != 0)
    result = torch.zeros_like(rows)

    def packed(changes: Tensor, **how: Any) -> FunctionProduct:
        everywhere = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
        everywhere[kept.cpu()] = changes
        value = operand.restore(_in_range(result, f"{f.name}({given.name}) v").T)
        return FunctionProduct(value=value, changes=everywhere, **how)

    if not bool(kept.any()) or (exact := _exact(given, f, rows[kept].T)) is not None:
        if bool(kept.any()) and exact is not None:
            result[kept] = exact.T
        none, seconds = torch.zeros(int(kept.sum()), dtype=torch.float64, device="cpu"), time.perf_counter() - begin
        how = {"seconds": seconds, "converged": True, "partial": False}
        return packed(none, method="exact", products=before + len(none), steps=0, **how)
    algorithm = KrylovFunction(
        target=given,
        function=f,
        rows=rows[kept],
        most=_most(given.size, int(kept.sum())) if steps == "auto" else min(int(steps), given.size),
        tol=tol if steps == "auto" else None,
        before=before,
    )
    outcome = run(algorithm, checkpoint=file, progress=progress, expected=given.expected)
    if not len(outcome.state.tensors["alphas"]):
        raise KeyboardInterrupt
    result[kept] = algorithm.columns(outcome.state).T
    changes, seconds = algorithm.changes(outcome.state), max(outcome.seconds, time.perf_counter() - begin)
    converged = not outcome.partial and bool((changes <= tol).all())
    how = {"seconds": seconds, "converged": converged, "partial": outcome.partial}
    count = len(outcome.state.tensors["alphas"])
    made = packed(changes, method="lanczos", products=outcome.state.products, steps=count, **how)
    if steps == "auto" and not converged and not outcome.partial:
        message = (
            f"{f.name}({given.name}) v still changes by {float(made.changes.max()):.2g} after {made.steps} steps, more than "
            f"tol={tol:g}; raise tol= or steps=, or add damping, + c * Identity, which makes functions smoother on the spectrum"
        )
        request.fail(message, made)
    return made


def _in_range(result: Tensor, what: str) -> Tensor:
    """The result, unless it is beyond what its dtype can hold.

    Raises:
        ProblemError: it is.
    """
    if not bool(torch.isfinite(result).all()):
        kind = str(result.dtype).removeprefix("torch.")
        raise ProblemError(f"{what} is beyond the range of {kind}; divide v by a power of two, or use float64")
    return result


def _most(size: int, columns: int) -> int:
    return min(size, max(20, min(LONGEST, KEPT // (columns * size))))


def _exact(given: Target, f: Scalar, columns: Tensor) -> Tensor | None:
    """The product f(A) X by the eigenvectors of a structure; None where there are none that are cheap, or accurate enough."""
    if (known := given.structured("eigh", CHEAP)) is None:
        return None
    pairs: Eigh = known[0]
    values, eps = small(pairs.eigenvalues), torch.finfo(columns.dtype).eps
    both = torch.cat([values, values.new_full((min(pairs.multiplicity, 1),), pairs.rest)])
    mapped = f.at(both, given.name, eps)
    rest = float(mapped[-1]) if pairs.multiplicity else 0.0
    result, check = rest * columns, pairs.rest * columns
    for start in range(0, len(values), 64):
        some = slice(start, start + 64)
        vectors = pairs.vectors(some).to(columns)
        inner = vectors.T @ columns
        result = result + vectors @ ((mapped[: len(values)][some] - rest).to(columns)[:, None] * inner)
        check = check + vectors @ ((values[some] - pairs.rest).to(columns)[:, None] * inner)
    # The eigenvectors of a Gram matrix can be poor: then they do not even give the product.
    products = given.back(given.multiply(columns))
    wrong = norms(check - products) > 100 * eps * both.abs().max() * norms(columns)
    return None if bool(wrong.any()) else result

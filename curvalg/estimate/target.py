"""Targets of estimators: any operator as a product of torch columns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor

from curvalg.errors import ExpressionError, FactsError, OptionError, VectorError
from curvalg.lowering import CurvatureOperator
from curvalg.lowering.inverses.rounding import noise
from curvalg.lowering.operators.composition import TorchOperator
from curvalg.lowering.operators.structured_operator import Quantity
from curvalg.lowering.vectors import Operand, Space, Vector, parse
from curvalg.problem import Layout, Problem
from curvalg.problem.kept.expected import Expected
from curvalg.problem.kept.measured import Measured
from curvalg.runs.checkpoint import Checkpoint
from curvalg.runs.run_file import FileName
from curvalg.runs.run_identity import run_identity
from curvalg.runs.run_state import Options
from curvalg.runs.sealed import digest
from curvalg.runs.unit import Finite, PowerOfTwo, sized
from curvalg.tensors.spaces import VectorSpace

Basis = Literal["device", "cpu"]
"""Where the vectors of a run lie."""
CHEAP = 512
"""Rows of a matrix that is built and factorised whatever is asked for."""


@dataclass(frozen=True)
class Target:
    """An operator as estimators see it.

    Args:
        name: for messages.
        shape: (rows, columns).
        space: of the vectors that it multiplies.
        multiply: columns (n, K) -> columns (m, K), finite.
        adjoint: columns (m, K) -> columns (n, K), by the transpose.
        symmetric: True or False where known, else None.
        subject: makes the fingerprint of what a run is about.
        operator: the curvature operator, if it is one.
        choices: what products with it measure and choose.
        psd: whether positive semi-definite: True or False where known, or where proof is required, else None.
        codomain: the space of the products; by default that of the vectors, or of a rectangular one whole vectors.
    """

    name: str
    shape: tuple[int, int]
    space: Space
    multiply: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    symmetric: bool | None
    subject: Callable[[], Options] = field(repr=False)
    operator: CurvatureOperator | None = None
    choices: Measured | None = None
    psd: bool | None = None
    half: float = 0.0
    """Relative error of products of models in half precision; 0 for others."""
    unit: PowerOfTwo | None = None
    """That products are in; None where they are what they are."""
    codomain: VectorSpace | None = None
    device: torch.device | None = None
    """Of the operands that users have, where it is another than that of the vectors here."""

    def on_host(self) -> Target:
        """The target with vectors in the memory of the host, which only the operands of products leave for the device."""
        device, host = self.space.device, torch.device("cpu")
        if device == host:
            return self

        def visiting(multiply: Callable[[Tensor], Tensor], images: VectorSpace) -> Finite:
            sized_ = multiply.sized if isinstance(multiply, Finite) else sized(multiply)

            def product(x: Tensor) -> tuple[Tensor, float]:
                found, largest = sized_(x.to(device))
                return found.to(host), largest

            return Finite(product, self.name, images)

        return replace(
            self,
            space=replace(self.space, device=host),
            device=device,
            multiply=visiting(self.multiply, self.images),
            adjoint=visiting(self.adjoint, self.vectors),
        )

    def in_units(self) -> Target:
        """The target with products in a unit of their own, which a run finds out; a target that has one, itself."""
        if self.unit is not None:
            return self
        unit = PowerOfTwo(self.name, self.space.dtype)
        multiply = unit.measuring(self.multiply, self.vectors, self.images)
        adjoint = unit.measuring(self.adjoint, self.images, self.vectors)
        return replace(self, multiply=multiply, adjoint=adjoint, unit=unit)

    def to(self, x: Tensor) -> Tensor:
        """Convert true numbers to the unit, as it is known by now."""
        return x if self.unit is None else self.unit.to(x)

    def back(self, x: Tensor) -> Tensor:
        """Convert numbers of the size of products to true numbers.

        Raises:
            ProblemError: they are out of range.
        """
        return x if self.unit is None else self.unit.back(x)

    def structured(self, quantity: Quantity, most: int) -> tuple[Any, int] | None:
        """The answer by the structure of a curvature operator, and the rows of the matrix built and factorised for it.

        Args:
            quantity: as of :meth:`curvalg.CurvatureOperator.exact`.
            most: rows that it may take.

        Returns:
            None where there is no such structure, it takes more, or it would be of whole vectors that no process holds.
        """
        rows = None if self.operator is None or not self.vectors.whole else self.operator.exact_rows(quantity)
        if self.operator is None or rows is None or rows > most:
            return None
        found = self.operator.exact(quantity)
        return None if found is None else (found, rows)

    def eigenvalue_tolerance(self, tol: float | None) -> float:
        """The tolerance of residuals relative to |λ|max, by default 1e-4 or what half precision allows; 0 is rounding."""
        if tol is None:
            return max(1e-4, self.half)
        return float(tol) or max(100 * torch.finfo(self.space.dtype).eps, self.half)

    def checkpoint(self, path: FileName | None, **more: str) -> Checkpoint | None:
        """The file of a run with this operator, and the rest of what the run is about; None for no path."""
        if path is None:
            return None
        return Checkpoint(path, {**self.subject(), **more}, self.choices, self.unit, self.vectors)

    @property
    def expected(self) -> Expected | None:
        """What is told how many products are to come; None where nobody asks."""
        return None if self.choices is None else self.choices.expected

    @property
    def size(self) -> int:
        """The number n of columns, of all processes together."""
        return self.shape[1]

    @property
    def local(self) -> int:
        """How many numbers of a vector this process holds."""
        return self.vectors.local

    @property
    def vectors(self) -> VectorSpace:
        """The space of the vectors that it multiplies: all sums over their numbers."""
        return self.space.vectors

    @property
    def images(self) -> VectorSpace:
        """The space of the products."""
        if self.codomain is not None:
            return self.codomain
        return self.vectors if self.shape[0] == self.shape[1] else VectorSpace(self.shape[0])

    @property
    def layout(self) -> Layout | None:
        """The layout of the parameters that it acts on."""
        return self.space.layout

    def operand(self, vectors: Vector) -> Operand:
        """Vectors of any kind as columns where the run has its own; what is restored lies where these vectors lie.

        Raises:
            VectorError: the wrong shape, kind or device, or entries that are not finite.
        """
        there = self.space if self.device is None else replace(self.space, device=self.device)
        if isinstance(vectors, Tensor) and vectors.device == self.space.device:  # such as eigenvectors of another run
            there = self.space
        given = parse(vectors, there, there)
        if there is self.space:
            return given
        return Operand(given.columns.to(self.space.device), lambda y: given.restore(y.to(self.device)))

    def rows(self, vectors: Vector | None, what: str) -> Tensor:
        """Vectors of any kind as rows (s, n); none of them where there are none.

        Raises:
            VectorError: the wrong shape, kind or device, or entries that are not finite.
        """
        if vectors is None:
            return torch.zeros(0, self.local, dtype=self.space.dtype, device=self.space.device)
        try:
            return self.operand(vectors).columns.T.contiguous()
        except VectorError as error:
            raise VectorError(f"{what}: {error}") from error


def target(op: Any, basis: Basis = "device") -> Target:
    """The target for any operator that estimators take.

    Args:
        op: a :class:`~curvalg.CurvatureOperator`, another SciPy ``LinearOperator``, a matrix (array or tensor).
        basis: where the vectors of a run lie: "device", that of the operator, or "cpu".

    Raises:
        ExpressionError: something else, or an operator that is not real.
    """
    if basis not in (known := get_args(Basis)):
        raise OptionError(f"expected basis to be one of {', '.join(map(repr, known))}, got {basis!r}")
    found = _target(op)
    return found.on_host() if basis == "cpu" else found


def _target(op: Any) -> Target:
    if isinstance(op, Target):
        return op
    if isinstance(op, CurvatureOperator):
        made, half = _of_torch(op, str(op.expr)), noise(op.problem)
        return replace(
            made,
            symmetric=op.facts.symmetric or False,
            psd=op.facts.psd or False,
            operator=op,
            choices=op.problem.measured,
            half=half,
            subject=lambda: run_identity(op.expr, op.problem, op.snapshot, half),
        )
    if isinstance(op, TorchOperator):
        return _of_torch(op, repr(op))
    if isinstance(op, Tensor):
        return _of_tensor(op)
    if isinstance(op, LinearOperator) or (hasattr(op, "shape") and hasattr(op, "dtype") and hasattr(op, "dot")):
        return _of_scipy(aslinearoperator(op), op)
    raise ExpressionError(
        f"expected a CurvatureOperator, a SciPy LinearOperator or a matrix, got {type(op).__name__}; an expression becomes an "
        "operator by expr.lower(problem)"
    )


def require_problem(problem: Any, function: str) -> None:
    """Raise unless a value is a problem.

    Raises:
        ExpressionError: it is none.
    """
    if not isinstance(problem, Problem):
        raise ExpressionError(
            f"{function}: expected a Problem, got {type(problem).__name__}; make one by Problem(model, loss, data)"
        )


def require_operator(op: Any, function: str) -> None:
    """Raise unless a value is a curvature operator.

    Raises:
        ExpressionError: it is none.
    """
    if not isinstance(op, CurvatureOperator):
        raise ExpressionError(
            f"{function}: expected a CurvatureOperator, got {type(op).__name__}; an expression becomes one by "
            "expr.lower(problem)"
        )


def _of_torch(op: TorchOperator, name: str) -> Target:
    space, transposed = op._domain, functools.cache(lambda: op.T)
    return Target(
        name,
        op.shape,
        space,
        Finite(op._sized, name, op._codomain.vectors),
        Finite(lambda x: transposed()._sized(x), name, space.vectors),
        None,
        lambda: {"operator": name, "precision": str(space.dtype)},
        codomain=op._codomain.vectors,
    )


def _of_tensor(matrix: Tensor) -> Target:
    if matrix.ndim != 2 or not matrix.dtype.is_floating_point:
        raise ExpressionError(
            f"expected a matrix of real floating-point numbers, got a tensor of shape {tuple(matrix.shape)} and {matrix.dtype}"
        )
    matrix, name = matrix.detach(), f"the {matrix.shape[0]} x {matrix.shape[1]} matrix"
    space, images = Space(matrix.shape[1], None, matrix.dtype, matrix.device), VectorSpace(matrix.shape[0])
    return Target(
        name,
        (matrix.shape[0], matrix.shape[1]),
        space,
        Finite(sized(lambda x: matrix @ x), name, images),
        Finite(sized(lambda x: matrix.T @ x), name, space.vectors),
        None,
        lambda: {"operator": name, "entries of the matrix": digest(matrix)},
    )


def _of_scipy(op: LinearOperator, given: Any) -> Target:
    kind = np.dtype(op.dtype if op.dtype is not None else np.float64)
    if kind.kind not in "fiub":
        raise ExpressionError(f"expected a real operator, got dtype {kind}; complex ones are not supported")
    dtype = torch.float32 if kind == np.float32 else torch.float64
    own = np.float32 if dtype == torch.float32 else np.float64
    rows, columns = (int(size) for size in op.shape)
    name = f"the {rows} x {columns} {type(given).__name__}"

    def product(apply: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.from_numpy(np.ascontiguousarray(apply(x.numpy()), dtype=own))

    arrays = (given,) if isinstance(given, np.ndarray) else ()
    space, images = Space(columns, None, dtype, torch.device("cpu")), VectorSpace(rows)
    return Target(
        name,
        (rows, columns),
        space,
        Finite(sized(product(op.matmat)), name, images),
        Finite(sized(product(_transposed(op, name))), name, space.vectors),
        None,
        lambda: {"operator": name, "precision": str(dtype), "entries": digest(*map(torch.from_numpy, arrays))},
    )


def _transposed(op: LinearOperator, name: str) -> Callable[[np.ndarray], np.ndarray]:
    def product(x: np.ndarray) -> np.ndarray:
        try:
            return np.asarray(op.rmatmat(x))
        except (NotImplementedError, TypeError) as error:  # SciPy calls a function that is None, or says so
            raise FactsError(
                f"expected products with the transpose, but {name} has none; define its rmatvec ({error})"
            ) from error

    return product

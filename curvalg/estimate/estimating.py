"""What trace, norm and diagonal have in common: arguments, the run, and the result or the complaint."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from curvalg.errors import ConvergenceError, CurvalgWarning, FactsError, OptionError
from curvalg.estimate.result import Estimate
from curvalg.estimate.sampling.sampler import Sketch
from curvalg.estimate.target import Target
from curvalg.runs.run import run
from curvalg.runs.run_file import FileName, require_place

OnFail = Literal["raise", "warn"]
Methods = Mapping[str, type[Sketch]]


@dataclass(frozen=True)
class Request:
    """The common keywords, checked.

    Raises:
        ExpressionError: one of them makes no sense.
    """

    products: int
    tol: float | None
    method: str
    seed: int
    maxiter: int | None
    on_fail: OnFail
    checkpoint: FileName | None
    progress: bool

    def __post_init__(self) -> None:
        if not _whole(self.products) or self.products < 1:
            raise OptionError(f"expected products to be an integer ≥ 1, got {self.products!r}")
        tol: Any = self.tol
        real = isinstance(tol, Real) and not isinstance(tol, bool)
        if tol is not None and not (real and 0 < float(tol) < 1):
            raise OptionError(
                f"expected a relative tolerance 0 < tol < 1, or None for an estimate by so many products, got {tol!r}"
            )
        if not _whole(self.seed):
            raise OptionError(f"expected seed to be an integer, got {self.seed!r}")
        if self.maxiter is not None and not (_whole(self.maxiter) and self.maxiter >= self.products):
            raise OptionError(
                f"expected maxiter to be a number of products ≥ {self.products} (products=), or None, got {self.maxiter!r}"
            )
        if self.on_fail not in ("raise", "warn"):
            raise OptionError(f"expected on_fail to be 'raise' or 'warn', got {self.on_fail!r}")
        require_place(self.checkpoint)

    def known(self, methods: Methods) -> None:
        """Refuse a method that is not among those given.

        Raises:
            ExpressionError: it is not.
        """
        if not isinstance(self.method, str) or self.method not in ("auto", *methods):
            names = ", ".join(map(repr, ("auto", *methods)))
            raise OptionError(f"expected method to be one of {names}, got {self.method!r}")

    def algorithm(self, kind: type[Sketch], target: Target, price: int = 1) -> Sketch:
        """The estimator.

        Raises:
            ExpressionError: not enough products for it.
        """
        exact = kind.method == "exact"
        least = price * (target.size if exact else 2 * kind.multiplications)
        if self.products < least and (exact or target.size > 1):
            why = f"one for each of {target.size} unit vectors" if exact else "two test vectors, to tell the error"
            raise OptionError(
                f"expected products ≥ {least} for method {kind.method!r} ({why}), got products={self.products}"
            )
        most = max(16 * self.products, min(2 * price * target.size, 1000)) if self.maxiter is None else self.maxiter
        tol = None if self.tol is None else float(self.tol)
        return kind(target.in_units(), int(self.products), tol, int(self.seed), int(most), price)

    def estimate(
        self, algorithm: Sketch, quantity: str, finish: Callable[[Estimate], Estimate] = lambda result: result
    ) -> Estimate:
        """Run the estimator.

        Args:
            algorithm: made by :meth:`algorithm`.
            quantity: what it estimates.
            finish: makes of an estimate in powers of the operator's unit one in the unit itself.

        Raises:
            ConvergenceError: the tolerance was not reached.
            ProblemError: a value that is out of range.
        """
        file = algorithm.target.checkpoint(self.checkpoint, quantity=quantity)
        outcome = run(algorithm, checkpoint=file, progress=self.progress)
        value, error = algorithm.result(outcome.state)
        if not value.numel():
            raise KeyboardInterrupt("interrupted before there was anything to estimate from")
        found = Estimate(
            method="exact" if algorithm.exact(outcome.state) else algorithm.method,
            products=outcome.state.products,
            seconds=outcome.seconds,
            converged=not outcome.partial and algorithm.reached(outcome.state),
            partial=outcome.partial,
            value=plain(value),
            error=plain(error),
        )
        finished, back = finish(found), algorithm.target.back
        value, error = (back(torch.as_tensor(x, dtype=torch.float64)) for x in (finished.value, finished.error))
        result = replace(finished, value=plain(value), error=plain(error))
        if not result.converged and not result.partial:
            self._fail(found, result, algorithm.target, quantity)
        return result

    def _fail(self, found: Estimate, result: Estimate, target: Target, quantity: str) -> None:
        value, error = (torch.as_tensor(x).double().norm() for x in (found.value, found.error))
        relative = float(error / value) if value else math.inf
        message = (
            f"the {quantity} of {target.name} has a standard error of {relative:.2g} of its value after {result.products} "
            f"products, more than tol={self.tol:g}; raise tol= or maxiter="
        )
        if self.on_fail == "raise":
            raise ConvergenceError(message, result)
        warnings.warn(message, CurvalgWarning, stacklevel=4)


def require_square(target: Target, quantity: str) -> None:
    """Refuse rectangular operators.

    Raises:
        FactsError: the operator is one.
    """
    m, n = target.shape
    if m != n:
        raise FactsError(
            f"expected a square operator for its {quantity}, but {target.name} is {m} x {n}; take that of A.T @ A or A @ A.T, "
            "or norm(A)"
        )


def require_psd(target: Target, instead: str) -> None:
    """Refuse curvature operators that are not proved positive semi-definite.

    Raises:
        FactsError: it is not proved.
    """
    if target.psd is False:
        raise FactsError(
            f"expected a positive semi-definite operator, but the fact psd is not proved for {target.name}; {instead}"
        )


def plain(x: Tensor) -> float | Tensor:
    """A float of a scalar."""
    return float(x) if x.ndim == 0 else x


def scaled(result: Estimate, value: float, error: float) -> Estimate:
    """The result with another value and error."""
    return replace(result, value=value, error=error)


def _whole(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)

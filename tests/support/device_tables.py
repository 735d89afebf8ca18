"""Everything that computes on a device, as tables: solvers, and estimators by their algorithms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor

from curvalg import (
    Eigenbasis,
    Expr,
    Identity,
    Kronecker,
    LowRank,
    Problem,
    diagonal_part,
    estimate,
    inverse,
    nystrom,
    registry,
    sqrt,
)
from tests.support.devices import both

mpl.use("Agg")


def _kronecker() -> Expr:
    factors = [
        torch.tensor(rows, dtype=torch.float64, device="cpu")
        for rows in ([[3, 1], [1, 2]], [[2, 1, 0, 0], [1, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 3]])
    ]
    return Kronecker(*factors)


def _eigenbasis() -> Expr:
    basis = torch.linalg.qr(torch.arange(64.0, device="cpu").double().reshape(8, 8).sin())[0]
    return Eigenbasis(basis, torch.linspace(0, 1, 8, dtype=torch.float64, device="cpu"))


def _low_rank(size: int) -> Expr:
    return LowRank(torch.linspace(-1, 1, 2 * size, dtype=torch.float64, device="cpu").reshape(size, 2))


_build = registry.build
SOLVES: dict[str, tuple[str, Callable[[Problem], Expr]]] = {
    "auto": ("mlp", lambda p: _build("ggn") + 0.1 * Identity),
    "diagonal": ("mlp", lambda p: _build("ggn_diagonal") + 0.1 * Identity),
    "kronecker": ("linear", lambda p: _kronecker() + 0.1 * Identity),
    "eigenbasis": ("linear", lambda p: _eigenbasis() + 0.1 * Identity),
    "blocks": ("mlp", lambda p: _build("kfac") + 0.1 * Identity),
    "woodbury": ("mlp", lambda p: _build("ggn_diagonal") + _low_rank(p.size) + 0.1 * Identity),
    "gram": ("mlp", lambda p: _build("covariance") + 0.1 * Identity),
    "kernel": ("linear", lambda p: _build("ntk") + 0.1 * Identity),
    "function": ("mlp", lambda p: sqrt(_build("ggn_diagonal")) + 0.1 * Identity),
    "dense": ("mlp", lambda p: _build("hessian") + 3 * Identity),
    "cg": ("mlp", lambda p: _build("ggn") + 0.1 * Identity),
    "minres": ("mlp", lambda p: _build("hessian") + 3 * Identity),
}
"""Solver -> the case, and a matrix that it solves."""


def solve(name: str, problem: Problem) -> Tensor:
    """A solve by the solver of this name."""
    op = inverse(SOLVES[name][1](problem), solver=name).lower(problem)  # type: ignore[arg-type]
    return op @ torch.ones(op.shape[1], dtype=problem.dtype, device=problem.device)


@functools.cache
def solved_on_the_cpu(name: str) -> Tensor:
    """The same on the CPU, with torch's own default device."""
    return solve(name, both(SOLVES[name][0])[0])


def _square_root(problem: Problem, **options: Any) -> Tensor:
    ones = torch.ones(problem.size, dtype=problem.dtype, device=problem.device)
    return estimate.matrix_function(_damped(problem), "sqrt", ones, **options).value


def _damped(problem: Problem) -> Any:
    return (_build("ggn") + 0.1 * Identity).lower(problem)


def _in_eigenbases(problem: Problem) -> Any:
    return inverse(_build("ekfac") + 0.1 * Identity).lower(problem)


def _hessian(problem: Problem) -> Any:
    return _build("hessian").lower(problem)


def _density(op: Any, **options: Any) -> list[Tensor]:
    found = estimate.spectral_density(op, probes=2, steps=6, **options)
    return [found.grid, found.density]


ESTIMATES: dict[str, Callable[[Problem], Any]] = {
    "trace": lambda p: estimate.trace(_hessian(p), products=12).value,
    "trace, xtrace": lambda p: estimate.trace(_hessian(p), products=12, method="xtrace").value,
    "trace, hutch++": lambda p: estimate.trace(_hessian(p), products=12, method="hutch++").value,
    "trace, xnystrace": lambda p: estimate.trace(_damped(p), products=12, method="xnystrace").value,
    "diagonal": lambda p: (
        estimate.diagonal(
            _hessian(p),
            products=12,
        ).value
    ),
    "diagonal, xdiag": lambda p: estimate.diagonal(_hessian(p), products=12, method="xdiag").value,
    "norm": lambda p: estimate.norm(_hessian(p), products=12).value,
    "spectral norm": lambda p: estimate.norm(_hessian(p), "spectral").value,
    "nuclear norm": lambda p: estimate.norm(_damped(p), "nuclear", products=12).value,
    "eigsh": lambda p: estimate.eigsh(_hessian(p), 3).eigenvalues,
    "eigsh, both ends": lambda p: estimate.eigsh(_hessian(p), 2, which="BE", block=2).eigenvalues,
    "svds": lambda p: estimate.svds(_build("jacobian").lower(p), 2, tol=torch.finfo(p.dtype).eps ** 0.5).values,
    "eigsh, basis on the host": lambda p: estimate.eigsh(_hessian(p), 3, basis="cpu").eigenvalues,
    "svds, basis on the host": lambda p: (
        estimate.svds(_build("jacobian").lower(p), 2, tol=torch.finfo(p.dtype).eps ** 0.5, basis="cpu").values
    ),
    "spectral_density, basis on the host": lambda p: _density(_hessian(p), outliers=2, basis="cpu"),
    "matrix_function, basis on the host": lambda p: _square_root(p, steps=10, basis="cpu"),
    "logdet, basis on the host": lambda p: estimate.logdet(_damped(p), products=12, basis="cpu").value,
    "spectral_density": lambda p: _density(_hessian(p)),
    "spectral_density, outliers": lambda p: _density(_hessian(p), outliers=2),
    "spectral_density, exact": lambda p: _density((_build("kfac") + 0.1 * Identity).lower(p)),
    "matrix_function": _square_root,
    "matrix_function, steps": lambda p: _square_root(p, steps=10),
    "logdet": lambda p: estimate.logdet(_damped(p), products=12).value,
    "logdet, exact": lambda p: estimate.logdet((_build("kfac") + 0.1 * Identity).lower(p)).value,
    "effective_dimension": lambda p: estimate.effective_dimension(_build("ggn").lower(p), 0.1, products=12).value,
    "tic": lambda p: estimate.tic(p, hessian=_build("ggn"), damping=0.1, products=12).value,
    "bilinear": lambda p: estimate.bilinear(_damped(p), p.gradient(), p.gradient()),
    "influence": lambda p: estimate.influence(_damped(p), p.gradient()),
    "influence of samples": lambda p: estimate.influence(_damped(p), query_batch=4).scores,
    "influence of samples, eigenbasis": lambda p: estimate.influence(_in_eigenbases(p), query_batch=4).scores,
    "influence of samples, extremes": lambda p: estimate.influence(_in_eigenbases(p), topk=2).topk.largest,
    "influence of gradients": lambda p: estimate.influence(_damped(p), p.gradient()[:, None].repeat(1, 9)),
    "influence_stream": lambda p: [part.scores for part in estimate.influence_stream(_in_eigenbases(p))],
    "self_influence": lambda p: estimate.self_influence(_damped(p)),
    "self_influence, eigenbasis": lambda p: estimate.self_influence(_in_eigenbases(p)),
    "functional_variance": lambda p: estimate.functional_variance(_damped(p), p),
    "functional_variance, eigenbasis": lambda p: estimate.functional_variance(_in_eigenbases(p), p),
    "saliency": lambda p: estimate.saliency(_damped(p)).value,
    "saliency, groups": lambda p: estimate.saliency(_damped(p), "row").value,
    "gradient_norms": lambda p: estimate.gradient_norms(p),
    "gradient_noise": lambda p: [getattr(estimate.gradient_noise(p), name) for name in ("trace", "square")],
    "nystrom": lambda p: nystrom(_build("ggn"), 5).lower(p) @ p.gradient(),
    "diagonal of an expression": lambda p: diagonal_part(_build("ggn"), probes=4).lower(p) @ p.gradient(),
    "heat_map": lambda p: torch.as_tensor(estimate.heat_map(_hessian(p)).images[0].get_array(), device="cpu"),
}
"""Every estimator, by every algorithm that computes something else on the device."""


def estimated(name: str, problem: Problem) -> list[Any]:
    """What an estimator gives, as a list of numbers and tensors."""
    found = ESTIMATES[name](problem)
    return found if isinstance(found, list) else [found]


@functools.cache
def estimated_on_the_cpu(name: str) -> list[Any]:
    """The same on the CPU, with torch's own default device."""
    return estimated(name, both("mlp")[0])

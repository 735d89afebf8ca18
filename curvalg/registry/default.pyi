"""The signatures of ``build`` for the terms that curvalg brings; written by ``python docs/checks/stubs.py``."""

from typing import Any, Literal, overload

from curvalg.expr.node import Expr
from curvalg.registry.registry import Registry

default: Registry

@overload
def build(name: Literal["centered_covariance"], /) -> Expr: ...
@overload
def build(name: Literal["centered_covariance_diagonal"], /) -> Expr: ...
@overload
def build(name: Literal["covariance"], /) -> Expr: ...
@overload
def build(name: Literal["covariance_diagonal"], /) -> Expr: ...
@overload
def build(
    name: Literal["ekfac"],
    /,
    *,
    fisher: Literal["exact", "mc", "empirical"] = ...,
    approximation: Literal["expand", "reduce"] = ...,
    joint: bool = ...,
    rest: Literal["small", "refuse", "diagonal", "exact"] = ...,
    samples: int = ...,
    seed: int = ...,
    eigh_dtype: Literal["own", "float64"] = ...,
) -> Expr: ...
@overload
def build(name: Literal["empirical_fisher"], /) -> Expr: ...
@overload
def build(name: Literal["fisher"], /) -> Expr: ...
@overload
def build(name: Literal["fisher_mc"], /, *, samples: int = ..., seed: int = ...) -> Expr: ...
@overload
def build(
    name: Literal["foof"],
    /,
    *,
    approximation: Literal["expand", "reduce"] = ...,
    joint: bool = ...,
    rest: Literal["small", "refuse", "diagonal", "exact"] = ...,
) -> Expr: ...
@overload
def build(name: Literal["ggn"], /) -> Expr: ...
@overload
def build(name: Literal["ggn_class"], /, *, stored: bool = ...) -> Expr: ...
@overload
def build(name: Literal["ggn_cross"], /, *, stored: bool = ...) -> Expr: ...
@overload
def build(name: Literal["ggn_diagonal"], /, *, samples: int = ..., seed: int = ...) -> Expr: ...
@overload
def build(name: Literal["ggn_mc"], /, *, samples: int = ..., seed: int = ...) -> Expr: ...
@overload
def build(name: Literal["ggn_same"], /, *, own: Literal["within", "same"] = ..., stored: bool = ...) -> Expr: ...
@overload
def build(name: Literal["ggn_within"], /, *, own: Literal["within", "same"] = ..., stored: bool = ...) -> Expr: ...
@overload
def build(name: Literal["hessian"], /) -> Expr: ...
@overload
def build(name: Literal["hessian_diagonal"], /, *, probes: int = ..., seed: int = ...) -> Expr: ...
@overload
def build(name: Literal["hessian_fd"], /, *, step: float | None = ..., tol: float | None = ...) -> Expr: ...
@overload
def build(name: Literal["jacobian"], /) -> Expr: ...
@overload
def build(
    name: Literal["kfac"],
    /,
    *,
    fisher: Literal["exact", "mc", "empirical"] = ...,
    approximation: Literal["expand", "reduce"] = ...,
    joint: bool = ...,
    rest: Literal["small", "refuse", "diagonal", "exact"] = ...,
    samples: int = ...,
    seed: int = ...,
    factored_damping: float = ...,
) -> Expr: ...
@overload
def build(
    name: Literal["kfoc"],
    /,
    *,
    fisher: Literal["exact", "mc", "empirical"] = ...,
    joint: bool = ...,
    rest: Literal["small", "refuse", "diagonal", "exact"] = ...,
    samples: int = ...,
    seed: int = ...,
    iterations: int = ...,
    tol: float = ...,
) -> Expr: ...
@overload
def build(name: Literal["loss_hessian"], /) -> Expr: ...
@overload
def build(name: Literal["ntk"], /) -> Expr: ...
@overload
def build(name: Literal["residual"], /) -> Expr: ...
@overload
def build(name: str, /, **options: Any) -> Expr: ...

"""Calls of terms, which may be anybody's code: what they are given stays as it is, and what they return fits."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Mapping
from typing import Any

import optree
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from curvalg.errors import ExpressionError
from curvalg.expr.node import Expr
from curvalg.expr.term import DatasetTerm, GradientTerm, MatrixTerm, NamedExpr, Term
from curvalg.problem import Batch
from curvalg.tensors import trees

OURS = ("curvalg", "curvalg_plugins")
"""Packages whose terms are tested here, so that products need not look after them."""


def call(term: Expr, method: str, *given: Any) -> Any:
    """The result of a method of a term.

    Args:
        term: the term.
        method: its name.
        given: its arguments.

    Raises:
        ExpressionError: it wrote into an argument, which other terms of a sum, or the user, see as well.
    """
    function = getattr(term, method)
    if is_ours(term):
        return function(*given)
    before = {id(t): _version(t) for t in _tensors(given)}
    result = function(*given)
    # What a batch makes when it is first asked for has not been written into before.
    written = [t for t in _tensors(given) if _version(t) != before.get(id(t), 0)]
    if written:
        raise ExpressionError(
            f"{named(term)}.{method} writes into a tensor that it was given (of shape {tuple(written[0].shape)}); other terms "
            "and your data share it. Write t * 2 instead of t.mul_(2), or clone it first"
        )
    return result


def is_ours(term: Expr) -> bool:
    """Whether the term is part of this project, and so tested here."""
    return type(term).__module__.partition(".")[0] in OURS


def require_defined(term: NamedExpr) -> None:
    """Raise for a term without the methods that its matrix is made of, as where their names are misspelt.

    Raises:
        ExpressionError: it lacks them.
    """
    base = next((kind for kind in _NEEDED if isinstance(term, kind)), None)
    if base is None:
        return
    names = _NEEDED[base]
    lacking = [name for name in names if getattr(type(term), name) is getattr(base, name)]
    if not lacking or (issubclass(base, Term) and len(lacking) == 1):
        return
    raise ExpressionError(
        f"{named(term)} does not define {' or '.join(lacking)}, of which its matrix is made; it defines "
        f"{', '.join(_methods(type(term))) or 'no method'}. Methods of a {base.__name__}: "
        f"{', '.join(dict.fromkeys(name for kind in base.__mro__ if kind in _KINDS for name in _methods(kind)))}"
    )


_NEEDED: Mapping[type[NamedExpr], tuple[str, ...]] = {
    DatasetTerm: ("cotangent", "cotangent_dot"),
    Term: ("cotangent", "cotangent_dot"),
    MatrixTerm: ("accumulate", "finish"),
    GradientTerm: ("multiply",),
}
"""The methods that a matrix is made of, by kinds of terms, the special ones first; of the two of a local term one is enough."""
_KINDS = NamedExpr, Term, DatasetTerm, MatrixTerm, GradientTerm


def _methods(kind: type) -> list[str]:
    return [name for name, value in vars(kind).items() if inspect.isfunction(value) and not name.startswith("_")]


def _tensors(given: tuple[Any, ...]) -> list[Tensor]:
    found: list[Any] = []
    for part in given:
        if isinstance(part, Batch):
            found += [*vars(part).values(), *trees.tensors(part.target)]
        else:
            found += [part] if isinstance(part, Tensor) else optree.tree_leaves(part, namespace=trees.NAMESPACE)
    return [t for t in found if isinstance(t, Tensor)]


def _version(t: Tensor) -> int:
    while is_functorch_wrapped_tensor(t):  # several columns at a time: the count is that of the tensor behind
        t = get_unwrapped(t)
    return 0 if t.is_inference() else t._version


def named(term: Expr) -> str:
    """The name of a term with the distribution that it comes from."""
    module = type(term).__module__
    found = importlib.metadata.packages_distributions().get(module.partition(".")[0])
    label = getattr(term, "label", type(term).__name__)
    known = found is not None and _holds(found[0], module)
    return f"{label} (of the distribution {found[0]})" if found and known else f"{label} (of the module {module})"


def _holds(distribution: str, module: str) -> bool:
    """Whether a module is a file of a distribution: packages called ``tests`` are in many, and in people's own folders."""
    package, path = module.partition(".")[0], module.replace(".", "/")
    files = [str(file) for file in importlib.metadata.files(distribution) or ()]
    own = [file for file in files if file.startswith((f"{package}/", f"{package}."))]
    # An editable installation lists none of its modules.
    return not own or any(file in (f"{path}.py", f"{path}/__init__.py") or file.startswith(f"{path}.") for file in own)


def fitting(term: Expr, method: str, value: Any, like: Tensor, *, like_what: str = "the output") -> Tensor:
    """The tensor that a term returned, if it fits.

    Args:
        term: the term.
        method: that returned it.
        value: what it returned.
        like: a tensor of the right shape, dtype and device.
        like_what: that tensor, for messages.

    Raises:
        ExpressionError: another kind, shape, dtype or device. Autograd broadcasts a wrong shape without an error.
    """
    if not isinstance(value, Tensor) or value.shape != like.shape:
        none = "" if isinstance(term, GradientTerm) else " or None"
        raise ExpressionError(
            f"{named(term)}.{method} must return a tensor of {like_what}'s shape {tuple(like.shape)}{none}, got "
            f"{trees.describe(value)}"
        )
    if value.device != like.device or value.dtype != like.dtype:
        raise ExpressionError(
            f"{named(term)}.{method} must return {like.dtype} on {like.device} as {like_what} is, got {value.dtype} on "
            f"{value.device}"
        )
    return value

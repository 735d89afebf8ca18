"""The functions of torch that only pick and arrange the entries of a tensor, or cast it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from curvalg.problem.layers.origin import Origin, PathStep

_T = Tensor


def _getter(name: str) -> Any:
    """The function that gives an attribute of a tensor."""
    return getattr(Tensor, name).__get__


CASTS = frozenset(
    (
        *(_T.float, _T.double, _T.half, _T.bfloat16, _T.to, _T.type, _T.type_as),
        *(_T.contiguous, _T.clone, torch.clone, _T.requires_grad_),
    )
)
"""Functions that leave every entry in its place."""
_ARRANGEMENTS = frozenset(
    (
        *(_T.view, _T.reshape, torch.reshape, _T.flatten, torch.flatten, _T.unflatten, torch.unflatten, _T.view_as),
        *(_T.reshape_as, _T.permute, torch.permute, _T.transpose, torch.transpose, _T.t, torch.t, _getter("T")),
        *(_getter("mT"), _T.swapaxes, torch.swapaxes, _T.swapdims, torch.swapdims, _T.movedim, torch.movedim),
        *(_T.unsqueeze, torch.unsqueeze, _T.squeeze, torch.squeeze, _T.flip, torch.flip, _T.roll, torch.roll),
        *(_T.narrow, torch.narrow, _T.select, torch.select, _T.diagonal, torch.diagonal, _T.__getitem__),
        *(_T.chunk, torch.chunk, _T.split, torch.split, _T.split_with_sizes, torch.split_with_sizes),
        *(_T.unbind, torch.unbind, _T.tensor_split, torch.tensor_split, _T.__iter__),
    )
)
"""Functions that give each entry one place at most."""


def followed(func: Any, origin: Origin, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> list[Any] | None:
    """The pairs (tensor, its origin) of what a function made of a tensor that came from a parameter; None for other functions.

    Args:
        func: the function.
        origin: of its first argument.
        args: its arguments, that one first.
        kwargs: its other arguments.
        output: its result.
    """
    if func in CASTS:
        return [(output, origin)] if output.shape == args[0].shape else None
    if func not in _ARRANGEMENTS or any(isinstance(a, Tensor) and a.ndim for a in _plain((args[1:], kwargs))):
        return None
    rest, options = args[1:], dict(kwargs)
    label = f"{getattr(func, '__qualname__', func)}{rest}{sorted(options.items())}"
    if getattr(func, "__self__", None) is not None:
        label = f"{getattr(func.__self__, '__name__', '')}.{label}"
    if isinstance(output, Tensor):
        return [(output, origin.then(PathStep(label, partial(_made, func, rest, options))))]
    # Each part by its number; iterators are used up by the caller.
    if not isinstance(output, (tuple, list)):
        return None
    return [
        (part, origin.then(PathStep(f"{label}[{i}]", partial(_part_of, i, func, rest, options))))
        for i, part in enumerate(output)
    ]


# Functions of the module: a layer of one process can go to another.
def _made(func: Any, rest: tuple[Any, ...], options: dict[str, Any], t: Tensor) -> Any:
    return func(t, *rest, **options)


def _part_of(number: int, func: Any, rest: tuple[Any, ...], options: dict[str, Any], t: Tensor) -> Any:
    return func(t, *rest, **options)[number]


def _plain(value: Any) -> list[Any]:
    """Everything in nested arguments."""
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in _plain(part)]
    if isinstance(value, dict):
        return _plain(tuple(value.values()))
    return [value]

"""Normal priors around zero with a precision for each parameter tensor."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from curvalg import Block, Expr, Identity, Layout, OptionError, block_diagonal

By: TypeAlias = Literal["all", "module", "parameter"]
Groups: TypeAlias = tuple[tuple[str, ...], ...]
Precisions: TypeAlias = dict[str, float]
"""Name of a parameter -> precision δ of the prior of its numbers."""


def precisions(prior: float | Mapping[str, float], layout: Layout) -> Precisions:
    """The precision of each parameter, from one number or from patterns of names.

    Raises:
        OptionError: a number that is not positive, a pattern that fits nothing, or parameters without a number.
    """
    given = prior if isinstance(prior, Mapping) else {"*": prior}
    found: Precisions = {}
    for pattern, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise OptionError(f"prior: a precision is a positive number, got {value!r}")
        names = [name for name in layout.names if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            raise OptionError(f"prior: no parameter fits {pattern!r}; there are {', '.join(layout.names)}")
        found.update(dict.fromkeys(names, float(value)))
    if missing := [name for name in layout.names if name not in found]:
        raise OptionError(f"prior: expected a precision for every parameter, got none for {', '.join(missing)}")
    return {name: found[name] for name in layout.names}


def module_of(name: str) -> str:
    """The module that owns a parameter."""
    return name.rpartition(".")[0]


def groups_by(by: By, layout: Layout) -> Groups:
    """The groups of parameters that share a precision.

    Raises:
        OptionError: an unknown way.
    """
    if by == "all":
        return (tuple(layout.names),)
    if by == "parameter":
        return tuple((name,) for name in layout.names)
    if by != "module":
        raise OptionError(f"by is 'all', 'module' or 'parameter', got {by!r}")
    owners: dict[str, list[str]] = {}
    for name in layout.names:
        owners.setdefault(module_of(name), []).append(name)
    return tuple(map(tuple, owners.values()))


def as_expression(prior: Precisions) -> Expr:
    """The precision matrix of the prior, diagonal."""
    if len(set(prior.values())) == 1:
        return next(iter(prior.values())) * Identity
    together: dict[tuple[str, float], list[str]] = {}
    for name, value in prior.items():
        together.setdefault((module_of(name), value), []).append(name)
    return block_diagonal([Block(tuple(names), value * Identity) for (_, value), names in together.items()])


def as_vector(prior: Precisions, layout: Layout) -> Tensor:
    """The diagonal of the precision matrix, (D,), float64."""
    sizes = [layout.shapes[name].numel() for name in layout.names]
    values = torch.tensor([prior[name] for name in layout.names], dtype=torch.float64, device="cpu")
    return values.repeat_interleave(torch.tensor(sizes, device="cpu"))

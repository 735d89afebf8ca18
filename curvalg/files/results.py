"""Results of estimators as tensors with a description that JSON can hold, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

import curvalg.estimate
from curvalg.errors import OptionError
from curvalg.estimate.attribution.rank_error import RankError
from curvalg.estimate.attribution.ranking import Ranking
from curvalg.estimate.result import Result
from curvalg.files.leaves import Described
from curvalg.problem import Layout
from curvalg.solve import SolveResult
from curvalg.solve.quadrature import GaussRules

PARTS: tuple[type, ...] = (GaussRules, RankError, Ranking)
"""Classes of what results hold beside tensors and numbers."""


def known_results() -> dict[str, type]:
    """Names of the results that files hold, and their classes."""
    assert curvalg.estimate  # which defines them
    kinds: tuple[type, ...] = (SolveResult, *_derived(Result))
    return {kind.__name__: kind for kind in kinds}


def _derived(kind: type[Result]) -> Iterator[type[Result]]:
    for child in kind.__subclasses__():
        if child.__module__.startswith("curvalg."):
            yield child
        yield from _derived(child)


def describe_result(result: Any, tensors: dict[str, Tensor]) -> Described:
    """The description of a result; its tensors go to ``tensors``, by the names of their fields.

    Raises:
        OptionError: an entry that a file cannot hold.
    """
    return _entries(result, "", tensors)


def _entries(value: Any, prefix: str, tensors: dict[str, Tensor]) -> Described:
    names = [entry.name for entry in fields(value)]
    return {name: _describe(getattr(value, name), f"{prefix}{name}", tensors) for name in names}


def _describe(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Layout):
        return {"layout": describe_layout(value)}
    if isinstance(value, (tuple, list)):
        return {"several": [_describe(part, f"{name}.{i}", tensors) for i, part in enumerate(value)]}
    if isinstance(value, Mapping):
        return {"named": {key: _describe(part, f"{name}.{key}", tensors) for key, part in value.items()}}
    if type(value) in PARTS:
        return {"part": [type(value).__name__, _entries(value, f"{name}.", tensors)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise OptionError(f"cannot write the entry {name!r} to a file: it is a {type(value).__name__}")


def require_whole_result(kind: str, layout: Layout | None, tensors: Mapping[str, Any]) -> None:
    """Raise for vectors of which this process has a part, as the file would hold that of one process alone."""
    if layout is None or layout.whole is layout:
        return
    if parts := [name for name, t in tensors.items() if layout.size in getattr(t, "shape", ())]:
        raise OptionError(
            f"a file holds whole vectors, but of {', '.join(parts)} of {kind} each process has a part, as parameters are "
            "sharded; put them together by problem.layout.full(...), which all processes call, and write them with "
            "safetensors, or pass checkpoint= to the estimator, which writes a file of each process"
        )


def read_result(kind: str, described: Described, tensors: Mapping[str, Tensor]) -> Any:
    """The result of a description.

    Raises:
        Exception: of any kind, for what is no description.
    """
    return _made(known_results()[kind], described, tensors)


def _made(kind: type, described: Described, tensors: Mapping[str, Tensor]) -> Any:
    return kind(**{name: _read(value, tensors) for name, value in described.items()})


def _read(described: Described, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, value),) = described.items()
    return _READERS[kind](value, tensors)


_READERS: dict[str, Any] = {
    "part": lambda part, tensors: _made({kind.__name__: kind for kind in PARTS}[part[0]], part[1], tensors),
    "tensor": lambda name, tensors: tensors[name],
    "layout": lambda layout, tensors: read_layout(layout),
    "several": lambda parts, tensors: tuple(_read(part, tensors) for part in parts),
    "named": lambda parts, tensors: {key: _read(part, tensors) for key, part in parts.items()},
    "value": lambda value, tensors: value,
}


def describe_layout(layout: Layout) -> list[Any]:
    """Names, shapes and dtypes of the parameters."""
    return [
        [name, list(shape), str(layout.dtypes[name]).removeprefix("torch.")] for name, shape in layout.shapes.items()
    ]


def read_layout(described: list[Any]) -> Layout:
    """The layout of a description."""
    # No memory: a layout looks at shapes and dtypes alone.
    return Layout(
        {name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for name, shape, dtype in described}
    )

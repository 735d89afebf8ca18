"""The files of ``--out``: the tensors and numbers of a result, for NumPy or for everything that reads safetensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from curvalg import save
from curvalg.cli.written.operator_layout import layout_of
from curvalg.cli.written.places import require_writable
from curvalg.distributed.group import active
from curvalg.errors import ProblemError
from curvalg.estimate import Result
from curvalg.files.results import require_whole_result
from curvalg.lowering import CurvatureOperator


def check_place(path: Path) -> None:
    """Raise, before anything is computed, for a file that could not be written.

    Raises:
        ProblemError: an unknown suffix, or a place where no file can be made.
    """
    if path.suffix not in WRITERS:
        raise ProblemError(
            f"--out writes .npz (for NumPy) or .safetensors, got {str(path)!r}; write {path.with_suffix('.npz').name}"
        )
    require_writable(path, "the result", "--out")


def write(path: Path, result: Result, op: CurvatureOperator, about: Mapping[str, str]) -> None:
    """Write a result.

    Args:
        path: whose suffix says how.
        result: whose fields the entries of the file are named after.
        op: what it is of.
        about: what was asked for, by name.
    """
    WRITERS[path.suffix](path, result, op, about)


def arrays(result: Result) -> dict[str, NDArray[np.generic]]:
    """The tensors, numbers and words of a result by the names of its fields; what is None is left out.

    Args:
        result: of any estimator.

    >>> import torch
    >>> from curvalg.estimate import diagonal
    >>> found = arrays(diagonal(torch.tensor([[2.0, 1.0], [1.0, 3.0]])))
    >>> found["value"], str(found["method"])
    (array([2., 3.]), 'exact')
    """
    return {name: np.asarray(value) for name, value in _entries(result, "")}


def _entries(whole: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Tensors and plain values by name; those of a part of the result as ``part.name``, as in safetensors."""
    for entry in fields(whole):
        name, value = f"{prefix}{entry.name}", getattr(whole, entry.name)
        if isinstance(value, Tensor):
            yield name, value.detach().cpu().numpy()
        elif isinstance(value, (bool, int, float, str)):
            yield name, value
        elif is_dataclass(value):
            yield from _entries(value, f"{name}.")


def _numpy(path: Path, result: Result, op: CurvatureOperator, about: Mapping[str, str]) -> None:
    """Arrays by name; those of parameters are cut up by ``names`` and ``sizes``, their numbers of entries."""
    layout = layout_of(op)
    cuts = (
        {} if layout is None else {"names": layout.names, "sizes": [s.stop - s.start for s in layout.slices.values()]}
    )
    found = arrays(result)
    require_whole_result(type(result).__name__, layout, found)
    if active().vectors.rank == 0:
        named: dict[str, Any] = {
            **found,
            **{name: np.asarray(value) for name, value in {**about, **cuts}.items()},
        }
        np.savez(path, **named)


def _safetensors(path: Path, result: Result, op: CurvatureOperator, about: Mapping[str, str]) -> None:
    save(result, path, problem=op.problem)


WRITERS: Mapping[str, Callable[[Path, Result, CurvatureOperator, Mapping[str, str]], None]] = MappingProxyType(
    {".npz": _numpy, ".safetensors": _safetensors}
)
"""Suffix -> what writes a file of that kind, on all processes that share the problem."""

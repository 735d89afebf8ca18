"""Reading what was written to files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from curvalg.errors import CheckpointError, CurvalgWarning, RegistryError
from curvalg.files.expressions import read_expression
from curvalg.files.results import describe_layout, known_results, read_result
from curvalg.files.saving import FORMAT
from curvalg.files.shards import read_shards
from curvalg.problem import Problem
from curvalg.runs.provenance import changed, remember
from curvalg.runs.run_file import FileName
from curvalg.runs.sealed import library_version

ENTRIES = {"format", "version", "torch", "kind", "object", "layout", "origins"}
"""Entries of the header."""


def load(path: FileName, problem: Problem | None = None) -> Any:
    """Read what :func:`curvalg.save` wrote: an expression, to be lowered on a problem, or a result, on the CPU.

    Products with a loaded expression are those of the one that was written, to the last bit on the same machine.

    Args:
        path: of the file (the first, where there are several).
        problem: that it is to be used with; a warning names everything in which the problem differs from the one that the
            file is of: parameters, their values, data, loss, versions of libraries.

    Raises:
        CheckpointError: no such file, another kind of file, a damaged one, or one of another format.
        RegistryError: an expression names a term that is not installed.
    """
    header, tensors = read_shards(path)
    given = os.fsdecode(path)
    number, version = header.get("format"), header.get("version")
    if type(number) is int and number != FORMAT:
        raise CheckpointError(
            f"{given} has format {number}, written by curvalg {version}; this is curvalg {library_version()}, which reads "
            f"format {FORMAT}; use that version, or write it again"
        )
    if header.keys() != ENTRIES or header["kind"] not in {"Expr", *known_results()}:
        raise CheckpointError(
            f"expected a file that curvalg.save wrote, but {given} has other entries, such as a checkpoint of a run has; name "
            "another file"
        )
    obj = _read(given, header, tensors)
    if problem is not None:
        _compare(given, header, problem)
    return obj


def _read(given: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    try:
        if header["kind"] != "Expr":
            return read_result(header["kind"], header["object"], tensors)
        expr = read_expression(header["object"], tensors)
        for origin in header["origins"][:1]:
            remember(expr, origin)
        return expr
    except RegistryError:
        raise
    except Exception as error:  # its checksum is right, so it was written by something else
        raise CheckpointError(
            f"expected a file that curvalg.save wrote, but {given} cannot be read as one ({type(error).__name__}: {error})"
        ) from error


def _compare(given: str, header: Mapping[str, Any], problem: Problem) -> None:
    found = changed(header["origins"], problem)
    if header["layout"] is not None and header["layout"] != describe_layout(problem.layout):
        there, here = (
            {name: shape for name, shape, _ in layout} for layout in (header["layout"], describe_layout(problem.layout))
        )
        wrong = sorted(name for name in {**there, **here} if there.get(name) != here.get(name))
        found.insert(0, f"the parameters {wrong or list(here)} differ in name, shape, dtype or order")
    if found:
        warnings.warn(
            f"{given} was made on another problem or state: {'; '.join(found)}. What it holds is used as it is",
            CurvalgWarning,
            stacklevel=3,
        )

"""Writing expressions and results to files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvalg.distributed.group import active, shared_call
from curvalg.errors import OptionError
from curvalg.expr import Expr
from curvalg.files.expressions import describe_expression
from curvalg.files.results import describe_layout, describe_result, known_results, require_whole_result
from curvalg.files.shards import write_shards
from curvalg.lowering import CurvatureOperator
from curvalg.problem import Problem
from curvalg.runs.provenance import identity, origins
from curvalg.runs.run_file import FileName, agreed
from curvalg.runs.sealed import library_version

FORMAT = 1


@shared_call
def save(obj: Any, path: FileName, *, problem: Problem | None = None, max_file_bytes: int = 2 * 2**30) -> None:
    """Write an expression, an operator or a result to a file that :func:`curvalg.load` reads in any process.

    The format is safetensors: tensors by name, and in the metadata JSON (the text of an expression, options, the layout of
    the parameters, fingerprints of parameters and data, versions of libraries) with a checksum of everything. No pickle, so
    that a file from elsewhere runs no code.

    Where several processes share the problem, all of them call it, and one writes.

    Args:
        obj: an expression, with or without arrays; an operator, of which the arrays are written (see
            :meth:`curvalg.Expr.bound`); or what an estimator or a solve gave (Eigenpairs, Density, Estimate, ...).
        path: of the file, in a folder that exists; an existing file is replaced in one piece.
        problem: what a result or an expression is of, so that :func:`curvalg.load` can compare. Bound expressions know it.
        max_file_bytes: bytes of tensors in one file; where there are more, it is cut into several, which lie beside the first.
            No single tensor is cut.

    Raises:
        OptionError: an object of another kind, or vectors of which each process has a part.
        ExpressionError: an operator that has no arrays of its own, or a term that is not registered.
        CheckpointError: no file can be written there.

    >>> import os, tempfile, torch
    >>> from curvalg import Identity, Problem, inverse, load, registry
    >>> problem = Problem(torch.nn.Linear(3, 2), torch.nn.MSELoss(), (torch.randn(8, 3), torch.randn(8, 2)))
    >>> factors = registry.build("kfac").bound(problem)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(factors, path := os.path.join(folder, "kfac.safetensors"))
    ...     loaded = load(path, problem)
    >>> loaded == factors, inverse(loaded + 0.1 * Identity).lower(problem).shape
    (True, (8, 8))
    """
    tensors: dict[str, Tensor] = {}
    layout = None if problem is None else problem.layout
    if isinstance(obj, CurvatureOperator):
        layout = obj.problem.layout
        obj = obj.bound_expression()
    if isinstance(obj, Expr):
        kind, described = "Expr", describe_expression(obj, tensors)
    elif type(obj).__name__ in known_results() and isinstance(obj, known_results()[type(obj).__name__]):
        kind, described = type(obj).__name__, describe_result(obj, tensors)
        layout = layout or getattr(obj, "layout", None)
    else:
        raise OptionError(
            f"save() writes expressions, operators and {', '.join(sorted(known_results()))}; got {type(obj).__name__}. Write "
            "tensors with torch.save or safetensors"
        )
    require_whole_result(type(obj).__name__, layout, tensors)
    known = origins(obj) if isinstance(obj, Expr) else []
    if problem is not None and not known:
        known = [identity(problem, problem.snapshot())]
    header = {
        "format": FORMAT,
        "version": library_version(),
        "torch": str(torch.__version__),
        "kind": kind,
        "object": described,
        "layout": None if layout is None else describe_layout(layout),
        "origins": known,
    }
    group = active().vectors
    # All wait until it is written, and learn of it where it could not be.
    agreed(group, lambda: write_shards(path, header, tensors, max_file_bytes) if group.rank == 0 else None)

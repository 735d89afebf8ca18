"""Runs of models in parts that are interrupted and resumed, on as many processes or on others."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import curvalg.estimate as est
from curvalg import CurvalgWarning, Problem, inverse, parse
from tests.support.inside import Inside
from tests.support.rank_faults import at_exchange
from tests.support.sharded_models import cut, vector

NAME = "run.safetensors"
SEEDS = {"v0": 5, "deflate": 7, "b": 5, "x0": 10}
"""Of the vectors that are given to runs."""
Asked = Callable[[Problem, Tensor, Any], dict[str, Any]]
"""(problem, places of its numbers, file) -> numbers, and vectors as pairs (places, this process's numbers)."""


def _estimate(function: Any, term: str, **options: Any) -> Asked:
    def ask(problem: Problem, index: Tensor, path: Any) -> dict[str, Any]:
        found = function(parse(term).lower(problem), checkpoint=path, on_fail="warn", **options)
        if isinstance(found.value, float):
            return {"value": torch.tensor([found.value, found.error]), "products": found.products}
        return {"value": (index, found.value), "error": (index, found.error), "products": found.products}

    return ask


def _eigsh(problem: Problem, index: Tensor, path: Any) -> dict[str, Any]:
    vectors_given = {name: vector(_size(problem), SEEDS[name])[index] for name in ("v0", "deflate")}
    options: dict[str, Any] = {"tol": 1e-7, "block": 2, "on_fail": "warn", **vectors_given}
    found = est.eigsh(parse("hessian").lower(problem), 8, checkpoint=path, **options)
    vectors = found.eigenvectors  # their signs are those of v0
    return {"value": found.eigenvalues, "vectors, roughly": (index, vectors), "products": found.products}


def _density(problem: Problem, index: Tensor, path: Any) -> dict[str, Any]:
    found = est.spectral_density(parse("hessian").lower(problem), probes=4, steps=12, checkpoint=path)
    return {"value": found.nodes, "density": found.density, "products": found.products}


def _function(problem: Problem, index: Tensor, path: Any) -> dict[str, Any]:
    v, op = vector(_size(problem))[index], parse("ggn + 0.1*identity").lower(problem)
    found = est.matrix_function(op, "sqrt", v, steps=14, checkpoint=path)
    return {"value": (index, found.value), "products": found.products}


def _solve(solver: Any) -> Asked:
    def ask(problem: Problem, index: Tensor, path: Any) -> dict[str, Any]:
        b, x0 = (
            torch.stack([vector(_size(problem), SEEDS[name] + i) for i in range(2)], 1)[index] for name in ("b", "x0")
        )
        op = inverse(parse("ggn + 0.1*identity"), solver=solver, rtol=1e-11, on_fail="warn").lower(problem)
        found = op.solve(b, x0=x0, checkpoint=path)
        return {"value": (index, found.x), "iterations, roughly": found.iterations}

    return ask


def _size(problem: Problem) -> int:
    return int(getattr(problem.layout, "whole", problem.layout).size)


MORE = {"products": 12, "tol": 1e-9, "maxiter": 60}
"""Budgets that are doubled, each in steps of its own."""
QUESTIONS: dict[str, Asked] = {
    "eigsh": _eigsh,
    "density": _density,
    "hutchinson": _estimate(est.trace, "hessian", method="hutchinson", **MORE),
    "hutch++": _estimate(est.trace, "hessian", method="hutch++", **MORE),
    "xtrace": _estimate(est.trace, "hessian", method="xtrace", **MORE),
    "xnystrace": _estimate(est.trace, "ggn", method="xnystrace", **MORE),
    "diagonal": _estimate(est.diagonal, "hessian", method="hutchinson", **MORE),
    "xdiag": _estimate(est.diagonal, "hessian", method="xdiag", **MORE),
    "norm": _estimate(est.norm, "hessian", **MORE),
    "logdet": _estimate(est.logdet, "ggn + 0.1*identity", products=64),
    "function": _function,
    "cg": _solve("cg"),
    "minres": _solve("minres"),
}
ONLY_IN_PARTS = ("logdet",)
"""What one process has an exact form of."""


def asked(
    group: Any, kind: str, name: str, path: str | None, stop: float | None = None, exchanges: int = 0
) -> dict[str, Any]:
    """The answer of a run.

    Args:
        kind: how the model is cut.
        path: of the file.
        stop: share of the exchanges after which the last rank is interrupted.
        exchanges: of a whole run.
    """
    warnings.simplefilter("ignore")
    problem, _, index = cut(group, kind, "wide")
    several = problem.group.vectors if kind == "tensor" else problem.group  # who has the most exchanges
    last = torch.distributed.get_rank(group) == torch.distributed.get_world_size(group) - 1
    number = int(stop * exchanges) if stop is not None and last else -1
    begin = several.headers
    with at_exchange(several, number, lambda: signal.raise_signal(signal.SIGINT)):
        found = QUESTIONS[name](problem, index, path)
    return {**found, "exchanges": several.headers - begin}


def asked_otherwise(group: Any, kind: str, name: str, path: str, other: str) -> dict[str, Any]:
    """The answer of a run with another vector, or of a model of which one number is another."""
    if other != "weight":
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(SEEDS, other, 20)
            return asked(group, kind, name, path)
    problem, _, index = cut(group, kind, "wide")
    problem.step((index == _size(problem) // 2).double(), 1e-9)
    return QUESTIONS[name](problem, index, path)


def beside_outliers(group: Any, kind: str, path: str) -> dict[str, Any]:
    """A density beside eigenvalues that have a file of their own."""
    problem, _, _ = cut(group, kind, "wide")
    begin = problem.group.headers
    op = parse("hessian").lower(problem)
    found = est.spectral_density(op, probes=3, steps=8, outliers=2, checkpoint=path)
    return {"value": found.nodes, "outliers": found.outliers, "exchanges": problem.group.headers - begin}


def resumed(group: Any, kind: str, name: str, folder: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Answers of a whole run, of one that was interrupted, and of this one when it was resumed.

    The folder ``stopped`` beside the file keeps the files as they were after the interruption.
    """
    whole = asked(group, kind, name, f"{folder}/whole.safetensors")
    path = f"{folder}/{NAME}"
    part = asked(group, kind, name, path, 0.7, whole["exchanges"])
    if torch.distributed.get_rank(group) == 0:
        kept = Path(folder) / "stopped"
        kept.mkdir()
        for file in Path(folder).glob("run.*"):
            shutil.copy(file, kept)
    return whole, part, asked(group, kind, name, path)


def of_one_process(group: Any, name: str) -> dict[str, Any]:
    """The answer of a process that has the whole model."""
    warnings.simplefilter("ignore")
    _, whole, _ = cut(group, "parameters", "wide")
    return QUESTIONS[name](whole, torch.arange(whole.size), None)


def often(group: Any, kind: str, name: str, path: str, planted: str | None = None, number: int = 0) -> dict[str, Any]:
    """The answer of a run that is written after every step; on the last rank a write may go wrong.

    Args:
        planted: "full": the disk is, from the write of a number on; "killed": the rank is, once it has written its file.
        number: of the write.
    """
    last = torch.distributed.get_rank(group) == torch.distributed.get_world_size(group) - 1
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inside = Inside(patch)
        inside(file_due=lambda _: True)
        write, count = inside["save_file"], itertools.count(1)

        def save(tensors: Any, path: Any, metadata: Any) -> None:
            at = next(count)
            if planted == "full" and at >= number:
                Path(path).write_bytes(b"the beginning")
                raise OSError(28, "No space left on device")
            write(tensors, path, metadata)
            if planted == "killed" and at == number:
                os.kill(os.getpid(), signal.SIGKILL)

        if last:
            inside(save_file=save)
        problem, _, index = cut(group, kind, "wide")
        begin = problem.group.headers
        found = QUESTIONS[name](problem, index, path)
        said = [
            str(w.message) for w in caught if issubclass(w.category, CurvalgWarning) and "checkpoint" in str(w.message)
        ]
    return {**found, "exchanges": problem.group.headers - begin, "said": said}


def joined(results: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The answers of all processes as one, with whole vectors."""
    found: dict[str, Tensor] = {}
    for name, value in results[0].items():
        if isinstance(value, tuple):
            size = 1 + max(int(r[name][0].max()) for r in results if len(r[name][0]))
            whole = torch.full((size, *value[1].shape[1:]), torch.nan, dtype=value[1].dtype)
            for r in results:
                whole[r[name][0]] = r[name][1]
            found[name] = whole
        elif name not in ("exchanges", "said"):
            found[name] = torch.as_tensor(value)
    return found


def apart(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest difference of two answers, relative to what is answered; their price may be another."""
    scale = float(right["value"].double().norm())
    names = [name for name in right if name != "products" and "roughly" not in name]
    return max(float((left[name] - right[name]).norm()) / scale for name in names)

"""Single and half precision against float64, within bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.device.allowed import PRECISION
from benchmarks.device.place import Place
from benchmarks.device.step import Outcome, Step
from benchmarks.device.workloads import draw, given, scaled_error
from curvalg import Expr, Identity, Problem, inverse, registry
from curvalg.estimate import eigsh

MODELS = {True: ("MLP", "CNN"), False: ("tiny", "tiny CNN")}
"""On a GPU, and elsewhere."""
AUTOCAST = {"autocast bfloat16": torch.bfloat16, "autocast float16": torch.float16}


def _product(expr: Expr) -> Callable[[Problem], Tensor]:
    def ask(problem: Problem) -> Tensor:
        product: Tensor = expr.lower(problem) @ draw(problem.size).to(problem.device, problem.dtype)
        return product

    return ask


def questions(tol: float) -> dict[str, Callable[[Problem], Tensor]]:
    """Answers that are compared; the tolerance is that of eigenvalues, which noise below it would keep from converging."""
    terms = {name: _product(registry.build(name)) for name in ("hessian", "ggn", "covariance", "kfac")}
    return {
        **terms,
        "inverse of ggn + 1": _product(inverse(registry.build("ggn") + Identity)),
        "largest eigenvalues": lambda p: eigsh(registry.build("ggn").lower(p), 2, which="LA", tol=tol).eigenvalues,
    }


def steps(place: Place) -> Iterator[Step]:
    for setting in PRECISION:
        for model in MODELS[place.real]:
            yield Step(f"{setting}, {model}", partial(_compared, place, setting, model))


def _compared(place: Place, setting: str, model: str) -> Outcome:
    exact = given(model, batches=2)
    reduced = exact.to(place, torch.float32)
    options: dict[str, Any] = {"autocast": AUTOCAST[setting]} if setting in AUTOCAST else {}
    bound, errors = PRECISION[setting], {}
    for name, ask in questions(bound).items():
        # A model of its own size is compared on the device too: float64 of a CPU takes long.
        expected = ask(exact.to(place).problem())
        with tf32(setting == "float32 with TF32"):
            errors[name] = scaled_error(ask(reduced.problem(**options)), expected)
    outcome = Outcome({"precision": setting, "model": model, **errors, "allowed": bound})
    for name, error in errors.items():
        outcome.need(error <= bound, f"{name} is off by {error:.1e}, {bound:g} is allowed")
    return outcome


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether matrix products and convolutions on a GPU may round to TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before

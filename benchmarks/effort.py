"""How much a run does: one row for the default, the quick and the full run."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.models import DEFAULT
from benchmarks.questions import PRODUCTS


@dataclass(frozen=True)
class Sizes:
    """Of the questions that are more than a product.

    Args:
        eigenvalues: how many of the largest, to the relative tolerance ``tol``.
        probes: random vectors of a spectral density, of ``steps`` Lanczos steps each.
        products: of a trace.
        damping: of an inverse, relative residuals to ``rtol``.
        rank: of a Nyström preconditioner.
        queries: rows that ask for influence scores.
        asked: rows whose outputs a posterior is asked for.
    """

    eigenvalues: int = 10
    tol: float = 1e-3
    probes: int = 10
    steps: int = 50
    products: int = 60
    damping: float = 1e-2
    rtol: float = 1e-5
    rank: int = 50
    queries: int = 128
    asked: int = 64


@dataclass(frozen=True)
class Effort:
    """Rounds and limits.

    Args:
        models: those that are run when none is named.
        columns: of products with several columns.
        splits: numbers of batches that the data are split into.
        columns_splits: the same of products with several columns.
        rounds: the most rounds of a task.
        seconds: the time that all rounds of a task may take together; there is always one.
        patience: a contestant whose first run takes longer, in seconds, is not warmed up, and far beyond not run again.
        minutes: no task is begun after so many.
        memory: the questions of the case of that name.
        choices: the same; of one column and of several.
        sizes: of questions that are more than a product.
    """

    models: tuple[str, ...] = DEFAULT
    columns: tuple[int, ...] = (16, 64)
    splits: tuple[int, ...] = (1, 8)
    columns_splits: tuple[int, ...] = (1,)
    rounds: int = 101
    seconds: float = 2.0
    patience: float = 3.0
    minutes: float = 15.0
    memory: tuple[str, ...] = ("hessian", "ggn", "covariance")
    choices: tuple[tuple[str, ...], tuple[str, ...]] = (PRODUCTS, ("hessian",))
    sizes: Sizes = field(default_factory=Sizes)


EFFORTS = {
    "default": Effort(),
    "full": Effort(
        columns_splits=(1, 8), choices=(PRODUCTS, PRODUCTS), seconds=20.0, patience=120.0, minutes=float("inf")
    ),
    "quick": Effort(
        models=("small MLP",),
        columns=(16,),
        splits=(1,),
        rounds=5,
        seconds=0.3,
        patience=0.5,
        minutes=0.75,
        memory=("hessian",),
        choices=(("hessian",), ("hessian",)),
        sizes=Sizes(eigenvalues=2, tol=1e-2, probes=2, steps=10, products=12, rank=10, rtol=1e-3),
    ),
}

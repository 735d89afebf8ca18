"""The command ``curvalg report``: one expression on one problem, looked at from all sides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from curvalg import __version__
from curvalg.cli.work import run_density
from curvalg.cli.work.run_diagonal import parts
from curvalg.cli.written.figures import draw_density, draw_pairs
from curvalg.cli.written.html_page import drawing, note, page
from curvalg.errors import FactsError
from curvalg.estimate import (
    Density,
    Eigenpairs,
    Estimate,
    Result,
    diagonal,
    effective_dimension,
    eigsh,
    spectral_density,
    trace,
)
from curvalg.lowering import CurvatureOperator
from curvalg.markup import table


@dataclass(frozen=True)
class ReportContents:
    """What a report is made of.

    Args:
        op: the operator.
        problem: the name of its problem.
        loss: L(θ); None where the problem has none.
        pairs: the largest eigenvalues.
        density: of all eigenvalues.
        trace: with its error.
        damping: λ of the effective dimension.
        dimension: the effective dimension, or the reason why there is none.
        diagonal: with its error.
    """

    op: CurvatureOperator
    problem: str
    loss: float | None
    pairs: Eigenpairs
    density: Density
    trace: Estimate
    damping: float
    dimension: Estimate | str
    diagonal: Estimate

    @property
    def results(self) -> dict[str, Result]:
        """The results by what they are of."""
        found: dict[str, Result | str] = {
            "eigenvalues": self.pairs,
            "density": self.density,
            "trace": self.trace,
            "effective dimension": self.dimension,
            "diagonal": self.diagonal,
        }
        return {name: result for name, result in found.items() if isinstance(result, Result)}

    @property
    def partial(self) -> bool:
        """Whether something of it was interrupted."""
        return any(result.partial for result in self.results.values())


def find(op: CurvatureOperator, problem: str, *, k: int, damping: float, seed: int, progress: bool) -> ReportContents:
    """All estimates of a report.

    Args:
        op: a symmetric operator.
        problem: the name of its problem.
        k: number of eigenvalues; fewer where the operator is smaller.
        damping: λ of the effective dimension.
        seed: of random vectors.
        progress: show it.

    Raises:
        FactsError: an operator that is not known to be symmetric.
    """
    options: dict[str, Any] = {"seed": seed, "progress": progress}
    dimension: Estimate | str
    try:
        dimension = effective_dimension(op, damping, **options)
    except FactsError as error:  # the other numbers need no definiteness
        dimension = str(error)
    return ReportContents(
        op,
        problem,
        None if op.problem.loss is None else op.problem.value(),
        eigsh(op, min(k, op.shape[0]), which="LM", **options),
        spectral_density(op, **options),
        trace(op, **options),
        damping,
        dimension,
        diagonal(op, **options),
    )


def html(found: ReportContents) -> str:
    """The page as text of HTML."""
    return page(f"{found.op.expr} on {found.problem}", _sections(found))


def _sections(found: ReportContents) -> Iterator[tuple[str, Sequence[str]]]:
    op, problem = found.op, found.op.problem
    yield "Problem", [table(["", ""], _facts(found)), note(repr(problem))]
    yield "Numbers", [table(["", "value", "error"], _numbers(found)), *_reasons(found)]
    values, residuals = (numbers.flip(0).tolist() for numbers in (found.pairs.eigenvalues, found.pairs.residuals))
    pairs = enumerate(zip(values, residuals, strict=True), start=1)
    rows = [[str(n), f"{value:.6g}", f"{residual:.1e}"] for n, (value, residual) in pairs]
    figure = draw_pairs(op, found.pairs, found.problem, "LM")
    heads = ["", "eigenvalue λ", "residual ‖Av − λv‖"]
    shown = [drawing(figure, "Eigenvalues and where they live"), table(heads, rows, values)]
    yield "Eigenvalues of largest magnitude", shown
    shares = [[f"{share:.0%}", f"{value:.4g}"] for share, value in run_density.quantiles(found.density)]
    yield (
        "Density of all eigenvalues",
        [
            drawing(draw_density(op, found.density, found.problem), "Density of eigenvalues"),
            table(["share of eigenvalues", "at or below λ"], shares),
        ],
    )
    yield "Diagonal by parameter", [table(*_parameters(found))]
    yield "What it cost", [table(["", "method and cost"], [[name, r.cost] for name, r in found.results.items()])]


def _facts(found: ReportContents) -> list[list[str]]:
    op, problem = found.op, found.op.problem
    return [
        ["operator", f"{op.shape[0]:,} × {op.shape[1]:,}"],
        ["parameters", f"{problem.size:,} in {len(problem.layout.names)} tensors"],
        ["samples", f"{problem.num_samples:,}"],
        ["precision and device", f"{problem.dtype} on {problem.device}".removeprefix("torch.")],
        ["made with", f"curvalg {__version__}, torch {torch.__version__}"],
    ]


def _numbers(found: ReportContents) -> Iterator[list[str]]:
    if found.loss is not None:
        yield ["loss", f"{found.loss:.6g}", "exact"]
    yield ["trace", *_estimate(found.trace)]
    if isinstance(found.dimension, Estimate):
        yield [f"effective dimension, λ = {found.damping:g}", *_estimate(found.dimension)]


def _reasons(found: ReportContents) -> list[str]:
    return [note(f"no effective dimension: {found.dimension}")] if isinstance(found.dimension, str) else []


def _estimate(result: Estimate) -> list[str]:
    return [f"{result.value:.6g}", "exact" if result.method == "exact" else f"± {result.error:.2g}"]


def _parameters(found: ReportContents) -> tuple[list[str], list[list[str]], list[float]]:
    every = list(parts(found.op, found.diagonal))
    rows = [
        [part.name, f"{part.size:,}", *(f"{x:.4g}" for x in (part.least, part.mean, part.most)), f"{part.share:.1%}"]
        + [f"{part.error:.1e}"]
        for part in every
    ]
    return (
        ["parameter", "entries", "min", "mean", "max", "share of trace", "largest error"],
        rows,
        [part.share for part in every],
    )

"""Commands on eigenvalues: ``curvalg eigs`` and ``curvalg density``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from curvalg.cli.asked_problem import AskedProblem, spread
from curvalg.cli.flags import AsJson, CheckpointFile, Expression, OutFile, PlotFile
from curvalg.cli.report import BAD_INPUT, FAILED, Report, stdout

if TYPE_CHECKING:  # importing it would import NumPy and SciPy for every command
    from curvalg.cli.work.run_eigs import End


class Which(StrEnum):
    """The end of the spectrum, by the names of :func:`curvalg.estimate.eigsh`."""

    LA = "LA"
    SA = "SA"
    LM = "LM"
    BE = "BE"

    @property
    def end(self) -> End:
        """The end in the words that the eigensolver takes."""
        return self.value


@spread
def eigs(
    context: typer.Context,
    expression: Expression,
    asked: AskedProblem,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Number of eigenvalues.")] = 6,
    which: Annotated[
        Which,
        typer.Option(help="Largest in magnitude (LM), largest (LA), smallest (SA), or half from each end (BE)."),
    ] = Which.LM,
    tol: Annotated[float, typer.Option(min=0.0, help="Relative tolerance; 0: machine precision.")] = 1e-4,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw the eigenvalues and the parameters of their eigenvectors (png, pdf, svg)."
        ),
    ] = None,
    out: OutFile = None,
    checkpoint: CheckpointFile = None,
    as_json: AsJson = False,
) -> None:
    """Compute eigenvalues of a symmetric expression on a problem, each with its true residual."""
    from curvalg.cli.work import run_eigs as work

    report: Report = context.obj
    with report.exits(BAD_INPUT):
        report.check_files(plot=plot, out=out)
        op = asked.lower(expression, report)
    with report.exits(FAILED):
        options = {
            "which": which.end,
            "tol": tol,
            "seed": asked.seed,
            "checkpoint": checkpoint,
            "progress": report.on_terminal,
        }
        pairs = work.solve(op, k, **options)  # type: ignore[arg-type]
        if as_json:
            typer.echo(work.as_json(op, pairs, problem=asked.problem, which=which.value, tol=tol, seed=asked.seed))
        else:
            stdout().print(work.table(op, pairs, asked.problem))
        if plot is not None:
            from curvalg.cli.written.figures import draw_pairs

            report.save_picture(draw_pairs(op, pairs, asked.problem, which.value), plot, quiet=as_json)
        report.save_result(pairs, out, op, asked.problem, quiet=as_json)
    report.finish(pairs)


class DensityAxis(StrEnum):
    """The axis of a density."""

    linear = "linear"
    log = "log"


@spread
def density(
    context: typer.Context,
    expression: Expression,
    asked: AskedProblem,
    probes: Annotated[int, typer.Option(min=1, help="Number of random vectors.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="Lanczos steps of each random vector.")] = 50,
    scale: Annotated[
        DensityAxis, typer.Option(help="The axis: λ, or |λ| on a logarithmic scale.")
    ] = DensityAxis.linear,
    outliers: Annotated[int, typer.Option(min=0, help="Eigenvalues of largest magnitude to compute first.")] = 0,
    plot: PlotFile = None,
    out: OutFile = None,
    checkpoint: CheckpointFile = None,
    as_json: AsJson = False,
) -> None:
    """Compute the density of the eigenvalues of a symmetric expression, by stochastic Lanczos quadrature."""
    from curvalg.cli.work import run_density as work
    from curvalg.estimate import spectral_density

    report: Report = context.obj
    with report.exits(BAD_INPUT):
        report.check_files(plot=plot, out=out)
        op = asked.lower(expression, report)
    with report.exits(FAILED):
        found = spectral_density(
            op,
            probes=probes,
            steps=steps,
            scale=scale.value,
            outliers=outliers,
            seed=asked.seed,
            checkpoint=checkpoint,
            progress=report.on_terminal,
        )
        if as_json:
            typer.echo(work.as_json(op, found, problem=asked.problem, seed=asked.seed))
        else:
            stdout().print(work.table(op, found, asked.problem))
        if plot is not None:
            from curvalg.cli.written.figures import draw_density

            report.save_picture(draw_density(op, found, asked.problem), plot, quiet=as_json)
        report.save_result(found, out, op, asked.problem, quiet=as_json)
    report.finish(found)

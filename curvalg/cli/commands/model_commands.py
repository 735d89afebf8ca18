"""Commands on whole models: ``curvalg landscape``, ``curvalg compare`` and ``curvalg report``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from curvalg.cli.asked_problem import NAME_HELP, AskedProblem, ProblemOptions, spread
from curvalg.cli.completion import complete_expression, complete_problem
from curvalg.cli.flags import AsJson, Expression, PlotFile, positive
from curvalg.cli.report import BAD_INPUT, FAILED, PARTIAL, Report, stdout


@spread
def landscape(
    context: typer.Context,
    asked: AskedProblem,
    along: Annotated[
        str | None,
        typer.Option(
            metavar="EXPR",
            autocompletion=complete_expression,
            help="Go along eigenvectors of the largest eigenvalues of this expression; by default along random directions as "
            "long as each parameter tensor.",
        ),
    ] = None,
    by: Annotated[
        Literal["tensor", "filter"],
        typer.Option(help="Random directions are as long as the parameters on each tensor, or on each filter of it."),
    ] = "tensor",
    directions: Annotated[int, typer.Option(min=1, max=2, help="One: a line, or two: a plane.")] = 1,
    reach: Annotated[float, typer.Option(min=1e-12, help="Steps go from -REACH to REACH.")] = 1.0,
    points: Annotated[int, typer.Option(min=2, help="Points along each direction.")] = 21,
    plot: PlotFile = None,
    as_json: AsJson = False,
) -> None:
    """Compute the loss along one or two directions through the parameters."""
    from curvalg.cli.work import run_landscape as work

    report: Report = context.obj
    with report.exits(BAD_INPUT):
        report.check_files(plot=plot)
        problem = asked.load(report)
    with report.exits(FAILED):
        with report.progress("computing losses"):
            found = work.landscape(problem, along, directions, reach, points, asked.seed, by)
        if as_json:
            typer.echo(work.as_json(found, problem=asked.problem, seed=asked.seed))
        else:
            stdout().print(work.table(found, asked.problem))
        if plot is not None:
            report.save_picture(work.draw(found, asked.problem), plot, quiet=as_json)


@spread
def compare(
    context: typer.Context,
    expression: Expression,
    asked: ProblemOptions,
    problems: Annotated[
        list[str],
        typer.Option(
            "--problem",
            "-p",
            metavar="NAME",
            help=f"Given twice, for A and for B. {NAME_HELP}",
            autocompletion=complete_problem,
        ),
    ],
    first_arguments: Annotated[
        list[str] | None,
        typer.Option("--arg-a", metavar="NAME=VALUE", help="Argument of the function of A alone. Repeatable."),
    ] = None,
    second_arguments: Annotated[
        list[str] | None,
        typer.Option("--arg-b", metavar="NAME=VALUE", help="Argument of the function of B alone. Repeatable."),
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Number of eigenvalues.")] = 5,
    damping: Annotated[
        float | None,
        typer.Option(callback=positive, help="Damping λ > 0 of the effective dimension; without it that is left out."),
    ] = None,
    products: Annotated[int | None, typer.Option(min=1, help="Largest number of products of each estimate.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show an expression on two problems side by side, such as two checkpoints of one model."""
    from curvalg import parse
    from curvalg.cli.work import run_compare as work
    from curvalg.errors import ProblemError

    report: Report = context.obj
    with report.exits(BAD_INPUT):
        if len(problems) != 2:
            raise ProblemError(f"compare takes two problems, got {len(problems)}; pass --problem A --problem B")
        expr = parse(expression)
        own = (first_arguments, second_arguments)
        ops = [expr.lower(asked.made(name, report, more)) for name, more in zip(problems, own, strict=True)]
    with report.exits(FAILED):
        side = partial(work.side, k=k, damping=damping, products=products, seed=asked.seed, progress=report.on_terminal)
        first, second = (side(op, name) for op, name in zip(ops, problems, strict=True))
        if as_json:
            typer.echo(work.as_json(first, second, damping=damping, seed=asked.seed))
        else:
            stdout().print(work.table(first, second, damping))
    if first.partial or second.partial:
        raise typer.Exit(PARTIAL)


@spread
def report(
    context: typer.Context,
    asked: AskedProblem,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page to write (html).")],
    expression: Annotated[
        str,
        typer.Argument(
            metavar="[EXPR]", help="A symmetric expression on the parameters.", autocompletion=complete_expression
        ),
    ] = "ggn",
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Number of eigenvalues.")] = 10,
    damping: Annotated[float, typer.Option(callback=positive, help="Damping λ > 0 of the effective dimension.")] = 1e-2,
) -> None:
    """Write one page on an expression: spectrum, density, trace, effective dimension, parameters, and what it cost."""
    report: Report = context.obj
    with report.exits(BAD_INPUT):
        report.check_files(page=out)
        op = asked.lower(expression, report)
    with report.exits(FAILED):
        from curvalg.cli.work import make_report as work

        found = work.find(op, asked.problem, k=k, damping=damping, seed=asked.seed, progress=report.on_terminal)
        text = work.html(found)
        if report.writes:
            out.write_text(text, encoding="utf-8")
        typer.echo(f"page: {out}")
    if found.partial:
        raise typer.Exit(PARTIAL)

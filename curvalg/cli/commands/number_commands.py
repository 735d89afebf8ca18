"""Commands on estimated numbers: ``curvalg estimate`` and ``curvalg diagonal``."""

from __future__ import annotations

from typing import Annotated

import typer

from curvalg.cli.asked_problem import AskedProblem, spread
from curvalg.cli.flags import AsJson, CheckpointFile, Expression, OutFile
from curvalg.cli.report import BAD_INPUT, FAILED, Report, stdout


@spread
def estimate(
    context: typer.Context,
    quantity: Annotated[
        str,
        typer.Argument(
            metavar="QUANTITY", help="trace, norm, logdet, effective-dimension or tic (EXPR is its Hessian)."
        ),
    ],
    expression: Expression,
    asked: AskedProblem,
    products: Annotated[
        int | None, typer.Option(min=1, help="Largest number of products; with --tol that of the first attempt.")
    ] = None,
    tol: Annotated[float | None, typer.Option(min=0.0, help="Standard error allowed, relative to the value.")] = None,
    damping: Annotated[float | None, typer.Option(min=0.0, help="Damping λ of effective-dimension and tic.")] = None,
    checkpoint: CheckpointFile = None,
    as_json: AsJson = False,
) -> None:
    """Estimate a number such as the trace of an expression on a problem, with its standard error."""
    from curvalg import parse
    from curvalg.cli.work import run_estimate as work
    from curvalg.registry.spec import did_you_mean

    report: Report = context.obj
    with report.exits(BAD_INPUT):
        if quantity not in work.QUANTITIES:
            from curvalg.errors import ExpressionError

            hint, known = did_you_mean(quantity, work.QUANTITIES), ", ".join(work.QUANTITIES)
            raise ExpressionError(f"unknown quantity {quantity!r}{hint}; known are {known}")
        expr = parse(expression)
        loaded = asked.load(report)
    with report.exits(FAILED):
        given = work.Asked(products, tol, asked.seed, checkpoint, report.on_terminal, damping)
        result = work.QUANTITIES[quantity](expr, loaded, given)
        if as_json:
            typer.echo(work.as_json(result, quantity, str(expr), asked.problem))
        else:
            stdout().print(work.line(result, quantity, str(expr), asked.problem))
    report.finish(result)


@spread
def diagonal(
    context: typer.Context,
    expression: Expression,
    asked: AskedProblem,
    products: Annotated[
        int, typer.Option(min=1, help="Largest number of products; with --tol that of the first attempt.")
    ] = 60,
    tol: Annotated[float | None, typer.Option(min=0.0, help="‖error‖ allowed, relative to ‖diagonal‖.")] = None,
    out: OutFile = None,
    checkpoint: CheckpointFile = None,
    as_json: AsJson = False,
) -> None:
    """Compute the diagonal of an expression, by parameter: least, mean and largest entry, and share of the trace."""
    from curvalg.cli.work import run_diagonal as work
    from curvalg.estimate import diagonal as compute

    report: Report = context.obj
    with report.exits(BAD_INPUT):
        report.check_files(out=out)
        op = asked.lower(expression, report)
    with report.exits(FAILED):
        found = compute(
            op, products=products, tol=tol, seed=asked.seed, checkpoint=checkpoint, progress=report.on_terminal
        )
        if as_json:
            typer.echo(work.as_json(op, found, problem=asked.problem, seed=asked.seed))
        else:
            stdout().print(work.table(op, found, asked.problem))
        report.save_result(found, out, op, asked.problem, quiet=as_json)
    report.finish(found)

"""Commands on terms and expressions: ``curvalg terms``, ``curvalg explain`` and ``curvalg plan``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from curvalg.cli.asked_problem import AskedProblem, PossibleProblem, spread
from curvalg.cli.completion import complete_expression
from curvalg.cli.flags import AsJson, Expression
from curvalg.cli.report import BAD_INPUT, FAILED, Report, stdout


def terms(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="Describe this term alone.", autocompletion=complete_expression),
    ] = None,
) -> None:
    """List the terms that expressions are made of, with their options and where they come from."""
    from curvalg import registry
    from curvalg.cli.work.list_terms import terms_table

    report: Report = context.obj
    with report.exits(BAD_INPUT):
        if name is not None:
            typer.echo(registry.describe(name))
        else:
            console = stdout()
            console.print(terms_table(console.width))


@spread
def explain(context: typer.Context, expression: Expression, asked: PossibleProblem) -> None:
    """Show how an expression is read, and what it becomes on a problem; without one, what is known and what it needs."""
    from curvalg import parse
    from curvalg.cli.work import show_expression as work

    report: Report = context.obj
    with report.exits(BAD_INPUT):
        expr = parse(expression)
        if not asked.given:
            typer.echo(work.text(expr))
            return
        op = asked.lower(expression, report)
    with report.exits(FAILED):
        typer.echo(f"{expr.tree()}\n\n{op.explain()}")


class PlanShard(StrEnum):
    """What is dealt out over ranks besides the data, by the names of :meth:`curvalg.CurvatureOperator.plan`."""

    data = "data"
    parameters = "parameters"


@spread
def plan(
    context: typer.Context,
    expression: Expression,
    asked: AskedProblem,
    ranks: Annotated[int, typer.Option(min=1, help="Number of processes.")] = 1,
    device_memory: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Memory of a rank, such as 80e9, 80GB or 80GiB.")
    ] = None,
    shard: Annotated[
        PlanShard | None,
        typer.Option(help="Deal out the data alone, or the parameters as well; by default what the memory asks for."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a Lanczos run.")] = 100,
    columns: Annotated[int, typer.Option(min=1, help="Vectors of a product.")] = 1,
    flops: Annotated[float | None, typer.Option(help="FLOPs a second that a rank sustains.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Bytes a second of a link between ranks.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what products take on many ranks, memory, traffic, work and time, without computing any."""
    from curvalg.cli.work import show_plan as work

    report: Report = context.obj
    with report.exits(BAD_INPUT):
        op = asked.lower(expression, report)
    with report.exits(FAILED):
        found = op.plan(
            ranks,
            device_memory,
            shard=None if shard is None else shard.value,
            steps=steps,
            columns=columns,
            flops=flops,
            bandwidth=bandwidth,
        )
        if as_json:
            typer.echo(found.as_json())
        else:
            stdout().print(work.table(found, asked.problem))

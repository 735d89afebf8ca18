"""Commands on single samples: ``curvalg influence``."""

from __future__ import annotations

from typing import Annotated

import typer

from curvalg.cli.asked_problem import AskedProblem, spread
from curvalg.cli.completion import complete_problem
from curvalg.cli.flags import AsJson, CheckpointFile, Expression, OutFile
from curvalg.cli.report import BAD_INPUT, FAILED, Report, stdout


@spread
def influence(
    context: typer.Context,
    expression: Expression,
    asked: AskedProblem,
    queries: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            autocompletion=complete_problem,
            help="What asks, named as a problem is: data for its model and loss, or a Problem of the same parameters, or a "
            "function that returns either.",
        ),
    ],
    query_arguments: Annotated[
        list[str] | None,
        typer.Option("--query-arg", metavar="NAME=VALUE", help="Argument of the function of --queries. Repeatable."),
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Samples to show on either side of each query.")] = 5,
    query_batch: Annotated[int, typer.Option(min=1, help="Queries at a time.")] = 64,
    out: OutFile = None,
    checkpoint: CheckpointFile = None,
    as_json: AsJson = False,
) -> None:
    """Find the training samples that help and harm each query most; EXPR is the inverse, "inverse(ekfac + 1e-2*identity)"."""
    from curvalg.cli.made_problems.arguments import parsed
    from curvalg.cli.made_problems.queries import load_queries
    from curvalg.cli.work import run_influence as work
    from curvalg.estimate import influence as compute

    report: Report = context.obj
    with report.exits(BAD_INPUT):
        report.check_files(out=out)
        op = asked.lower(expression, report)
        with asked.seeded(queries, report):
            asking = load_queries(queries, op.problem, parsed(query_arguments or []), asked.changes, report.group)
        _ = asking.num_samples  # says here that there are none
    with report.exits(FAILED):
        found = compute(
            op,
            asking,
            topk=k,
            query_batch=query_batch,
            checkpoint=checkpoint,
            progress=report.on_terminal,
        )
        if as_json:
            typer.echo(work.as_json(op, found, problem=asked.problem, queries=queries))
        else:
            stdout().print(work.table(op, found, asked.problem, queries))
        report.save_result(found, out, op, asked.problem, quiet=as_json)
    report.finish(found)

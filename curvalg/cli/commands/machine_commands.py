"""Commands on the installation: ``curvalg doctor``."""

from __future__ import annotations

import typer

from curvalg.cli.flags import AsJson
from curvalg.cli.report import FAILED, Report, stdout


def doctor(context: typer.Context, as_json: AsJson = False) -> None:
    """Show versions, devices and terms, and compare a tiny problem with plain torch; exits with 1 where that is wrong."""
    report: Report = context.obj
    with report.exits(FAILED), report.progress("looking"):
        from curvalg.cli.work import check_machine as work

        found = work.examine()
    if as_json:
        typer.echo(work.as_json(found))
    else:
        stdout().print(work.table(found))
    if not found.healthy:
        raise typer.Exit(FAILED)

"""The command line on several processes: all compute, one prints, and all exit alike."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import typer

from curvalg.cli.app import app
from curvalg.cli.report import BAD_INPUT, FAILED, Report
from curvalg.distributed.group import Group
from curvalg.distributed.launched import Launched, launched
from curvalg.errors import GroupError


def run_together() -> None:
    """Run the command line as one of the processes that torchrun started; exits with the code of all of them."""
    try:
        with Report().exits(BAD_INPUT), launched() as processes, _heard(processes.exchange.rank == 0):
            code = _agreed(_run(processes), processes.exchange)
    except typer.Exit as exit:
        code = exit.exit_code
    sys.exit(code)


def _run(processes: Launched) -> int:
    try:
        app(prog_name="curvalg", obj=processes)
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else 0 if exit.code is None else FAILED
    return 0


@contextlib.contextmanager
def _heard(wanted: bool) -> Iterator[None]:
    """A context that prints, or one that does not: every message is there once."""
    if wanted:
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
    ):
        yield


def _agreed(own: int, exchange: Group) -> int:
    """The exit code of all processes: that of a failure, where there is one."""
    report = Report()
    for _ in range(exchange.size):  # each may have to tell of a failure that came after the last exchange of the others
        try:
            codes = {int(code) for (code,) in exchange.numbers(own)}
        except GroupError as error:
            if not own:
                report.print_error(error, str(error))
            own = own or FAILED
        else:
            return min(codes - {0}, default=0)
    return own

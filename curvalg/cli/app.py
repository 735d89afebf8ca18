"""The command line as a whole: its commands, and the options that stand before them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from curvalg.cli.commands import (
    expression_commands,
    machine_commands,
    model_commands,
    number_commands,
    sample_commands,
    spectrum_commands,
)
from curvalg.cli.report import Report

COMMANDS: tuple[Callable[..., None], ...] = (
    expression_commands.terms,
    expression_commands.explain,
    expression_commands.plan,
    spectrum_commands.eigs,
    spectrum_commands.density,
    number_commands.estimate,
    number_commands.diagonal,
    sample_commands.influence,
    model_commands.landscape,
    model_commands.compare,
    model_commands.report,
    machine_commands.doctor,
)
"""All commands, in the order of ``curvalg --help``; a new one is a function of :mod:`curvalg.cli.commands` and a row here."""

app = typer.Typer(
    help="Curvature of neural networks: list terms, read expressions of them, compute eigenvalues, densities, traces and more.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from curvalg import __version__

        typer.echo(f"curvalg {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    context: typer.Context,
    show_traceback: Annotated[bool, typer.Option("--traceback", help="Show the full traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    context.obj = Report(show_traceback, context.obj)


for command in COMMANDS:
    app.command()(command)

"""The command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.device.file import DeviceResults
from benchmarks.device.parts import PARTS, says
from benchmarks.device.place import find
from benchmarks.device.run import run
from benchmarks.device.show import markdown, show
from benchmarks.environment import ROOT, describe

app = typer.Typer(
    help="Check and time curvalg on a device. Without a command: measure what is not in the file yet.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
WIDTH = 170
"""Of tables that are not printed to a terminal."""
RESULTS = ROOT / "benchmarks" / "results"


@app.callback(invoke_without_command=True)
def measure(
    context: typer.Context,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = None,
    simulated: Annotated[
        bool, typer.Option("--simulated", help="On a CPU that passes for a GPU, tiny models.")
    ] = False,
    part: Annotated[list[str] | None, typer.Option(help=f"Of: {', '.join(PARTS)}. May be repeated.")] = None,
    minutes: Annotated[float, typer.Option(min=0.0, help="What is not done by then is left to the next call.")] = 8.0,
    again: Annotated[bool, typer.Option("--again", help="Measure what is in the file already, too.")] = False,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="By default named after the device; none if simulated.")
    ] = None,
) -> None:
    """Measure, print a table and verdicts of each part, keep what is finished; exit code 1 if anything is wrong."""
    if context.invoked_subcommand is not None:
        return
    names = list(part or PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise typer.BadParameter(f"unknown {', '.join(unknown)}; known are {', '.join(PARTS)}", param_hint="--part")
    try:
        place = find("cuda" if simulated else device)
        path = json or (None if place.simulated else RESULTS / f"{place.slug}.json")
        results = DeviceResults.load(path) if path is not None and path.exists() else DeviceResults()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if simulated and not place.simulated:
        raise typer.BadParameter(
            "is read by `python -m benchmarks.device` before torch is there", param_hint="--simulated"
        )
    environment = describe([], place.device)
    results.environment = {**environment, "device": place.name}
    for name in names if again else ():
        results.parts.pop(name, None)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    console.print(f"{place.name}, torch {environment['torch']}, Python {environment['python']}", highlight=False)
    run(
        names,
        place,
        results,
        minutes=minutes,
        path=path,
        report=lambda name, found: show(name, found, results.environment, console),
    )
    if path is not None:
        console.print(f"written to {path}", markup=False, highlight=False, soft_wrap=True)
    if any(results.parts[name].failures for name in names):
        raise typer.Exit(1)


@app.command()
def table(file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSON of a run.")]) -> None:
    """Print a run as Markdown."""
    typer.echo(markdown(DeviceResults.load(file)))


@app.command()
def parts() -> None:
    """List the parts."""
    for name in PARTS:
        typer.echo(f"{name}: {says(name)}")

"""The command line of the suite."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import peers as peers_
from benchmarks import session
from benchmarks.cases import CASES
from benchmarks.effort import EFFORTS
from benchmarks.models import MODELS
from benchmarks.readme import with_block
from benchmarks.results import Record, Results
from benchmarks.table import everything, headline, speed

app = typer.Typer(
    help="Time curvalg against its peers. Without a command: measure.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
BLOCK = "speed"
"""The markers around the table of a page."""


@app.callback(invoke_without_command=True)
def measure(
    context: typer.Context,
    models: Annotated[str | None, typer.Option(metavar="A,B", help=f"Of: {', '.join(MODELS)}.")] = None,
    cases: Annotated[str | None, typer.Option(metavar="A,B", help=f"Of: {', '.join(CASES)}.")] = None,
    peers: Annotated[str | None, typer.Option(metavar="A,B", help=f"Of: {', '.join(peers_.names())}.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="The most rounds of a task.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.0, help="No task is begun after so many.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Under a minute: shows that all runs, says little.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Every column count on every split, and no limit of time.")
    ] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write what was measured to this file.")] = None,
    plots: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Draw pictures into this folder.")] = None,
) -> None:
    """Measure, print tables, and write JSON and pictures if asked to."""
    if context.invoked_subcommand is not None:
        return
    if quick and full:
        raise typer.BadParameter("--quick and --full exclude each other")
    if device != "cpu" and not torch.cuda.is_available():
        raise typer.BadParameter(f"{device} is not here: torch sees no GPU", param_hint="--device")
    effort = EFFORTS["quick" if quick else "full" if full else "default"]
    given: dict[str, Any] = {"rounds": rounds, "minutes": minutes}
    effort = dataclasses.replace(effort, **{name: value for name, value in given.items() if value is not None})
    console = Console(stderr=True)
    results = session.run(
        _chosen("--cases", cases, CASES),
        _chosen("--models", models, MODELS) if models else None,
        _chosen("--peers", peers, peers_.names()),
        effort,
        device,
        lambda record: _report(record, console),
    )
    if json is not None:
        results.save(json)
    if plots is not None:
        _draw(results, plots)
    typer.echo(everything(results))
    if failures := results.failures():
        console.print(*failures, sep="\n", style="red", highlight=False, markup=False)
        raise typer.Exit(1)


@app.command()
def plot(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSON of a run.")],
    folder: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="Where pictures go.")] = Path("."),
) -> None:
    """Draw the pictures of a run again."""
    _draw(Results.load(file), folder)


@app.command()
def table(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSON of a run.")],
    all_: Annotated[bool, typer.Option("--all", help="Every table.")] = False,
    headline_: Annotated[bool, typer.Option("--headline", help="The README's few figures alone.")] = False,
    write: Annotated[
        Path | None, typer.Option(metavar="PAGE", help=f"Write it between the <!-- {BLOCK} --> markers of this page.")
    ] = None,
) -> None:
    """Print the tables of a run as Markdown."""
    results = Results.load(file)
    shown = headline(results) if headline_ else everything(results) if all_ else speed(results)
    if write is not None:
        write.write_text(with_block(write.read_text("utf-8"), BLOCK, shown), encoding="utf-8")
    typer.echo(shown)


def _chosen(option: str, given: str | None, known: Iterable[str]) -> list[str]:
    names = list(known)
    if given is None:
        return names
    wanted = [name.strip() for name in given.split(",")]
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise typer.BadParameter(f"unknown {', '.join(unknown)}; known are {', '.join(names)}", param_hint=option)
    return wanted


def _report(record: Record, console: Console) -> None:
    ratios = [
        f"{label} {ratio:.2f}" for label in record.values if (ratio := record.ratio(label)) and label != "gradient"
    ]
    rounds = max(map(len, record.values.values()), default=0)
    console.print(f"[bold]{record.task}[/] ({rounds} rounds) {', '.join(ratios)}", highlight=False, soft_wrap=True)
    for check in record.checks.values():
        if check.verdict != "agrees":
            console.print(
                f"  {check.verdict}: {check.note}", style="yellow", highlight=False, markup=False, soft_wrap=True
            )
    for label, why in record.skipped.items():
        console.print(f"  {label} left out: {why}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _draw(results: Results, folder: Path) -> None:
    from benchmarks.plots import draw

    for path in draw(results, folder):
        typer.echo(f"picture: {path}", err=True)

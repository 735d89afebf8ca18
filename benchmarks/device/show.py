"""Tables and lines of a run, for terminals and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.device.file import DeviceResults, PartRecord
from benchmarks.device.parts import says
from benchmarks.device.step import Cell, Outcome

STYLES = {"PASS": "green", "FAIL": "bold red", "NOTE": "yellow"}


def text(cell: Cell) -> str:
    """Three digits of a number."""
    if cell is None:
        return "–"
    if not isinstance(cell, float):
        return str(cell)
    return f"{cell:.1e}" if cell and not 1e-2 <= abs(cell) < 1e5 else f"{cell:.3g}"


def columns(part: PartRecord) -> list[str]:
    """Of the table: those of all rows."""
    return list(dict.fromkeys(name for outcome in part.steps.values() for name in outcome.cells))


def lines(name: str, part: PartRecord) -> Iterator[tuple[str, str]]:
    """The verdict of each step and what else there is to say: (PASS, FAIL or NOTE; text)."""
    for step, outcome in part.steps.items():
        if outcome.skipped:
            yield "NOTE", f"{name}: {step}: skipped: {outcome.skipped}"
        for line in outcome.failures:
            yield "FAIL", f"{name}: {step}: {line}"
        for line in outcome.notes:
            yield "NOTE", f"{name}: {step}: {line}"
    good = [o for o in part.steps.values() if not o.failures and not o.skipped]
    if good:
        yield "PASS", f"{name}: {len(good)} of {len(part.steps)} steps"
    if not part.complete:
        yield "NOTE", f"{name}: cut by the time; the same command goes on with what is missing"


def show(name: str, part: PartRecord, environment: dict[str, Any], console: Console) -> None:
    """Print a part."""
    table = Table(title=f"{name}: {says(name)}", title_justify="left", title_style="bold")
    names = columns(part)
    for number, column in enumerate(names):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    table.add_column("seconds", justify="right")
    rows = [outcome for outcome in part.steps.values() if outcome.cells]
    for outcome in rows:
        table.add_row(*_row(outcome, names), text(outcome.seconds))
    if rows:
        console.print(table)
    for verdict, line in lines(name, part):
        console.print(f"[{STYLES[verdict]}]{verdict}[/]", end=" ")
        console.print(line, markup=False, highlight=False, soft_wrap=True, emoji=False)
    if any(part.made_with[key] != environment[key] for key in part.made_with):
        console.print(f"{name} was measured with another version; --again measures it anew", style="yellow")


def markdown(results: DeviceResults) -> str:
    """All parts, one under the other."""
    e = results.environment
    commit = e["curvalg"].get("commit", "")[:10]
    machine = ", ".join(dict.fromkeys((e["device"], e["processor"])))
    parts = [
        f"{machine}, Python {e['python']}, torch {e['torch']}, curvalg {e['curvalg']['version']}"
        + (f" ({commit})." if commit else ".")
    ]
    for name, part in results.parts.items():
        names = columns(part)
        rows = [
            names,
            ["---"] * len(names),
            *(_row(outcome, names) for outcome in part.steps.values() if outcome.cells),
        ]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        said = "\n".join(f"- {verdict}: {line}" for verdict, line in lines(name, part))
        parts.append("\n\n".join([f"## {name}: {says(name)}", *([table] if names else []), said]))
    return "\n\n".join(parts)


def _row(outcome: Outcome, names: list[str]) -> list[str]:
    return [text(outcome.cells.get(name)) if name in outcome.cells else "" for name in names]

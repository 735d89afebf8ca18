"""The command ``curvalg plan``: what a product and a Lanczos run take, before anything is computed."""

from __future__ import annotations

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from curvalg.planning import RunPlan


def table(plan: RunPlan, problem: str) -> Group:
    """The plan as a table for people, with the operator above it, and the cure and what was assumed below."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for column in ("", "what", "how much"):
        shown.add_column(column)
    topic = None
    for name, what, much in plan.rows():
        shown.add_row("" if name == topic else name, what, much)
        topic = name
    how = "parameters in parts" if plan.shard == "parameters" else "whole parameters on each"
    title = Text(f"{plan.expression} on {problem}, {plan.ranks} ranks, {how}", style="bold")
    cure = [Text(f"cure: {plan.cure}", style="bold")] if plan.cure else []
    return Group(title, Text(), shown, Text(), *cure, *(Text(f"note: {note}", style="dim") for note in plan.notes))

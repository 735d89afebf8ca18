"""Arguments and flags that several commands have in common; those of a problem are in :mod:`curvalg.cli.asked_problem`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from curvalg.cli.completion import complete_expression

Expression: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="EXPR", help='An expression, such as "ggn + 1e-3 * identity".', autocompletion=complete_expression
    ),
]
CheckpointFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the run to this file now and then, and go on from it if it is there."),
]
OutFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write the result to this file: .npz for NumPy, or .safetensors, which curvalg.load reads as well.",
    ),
]
PlotFile: TypeAlias = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the result (png, pdf, svg).")]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def positive(value: float | None) -> float | None:
    """The callback of an option that takes numbers above zero."""
    if value is not None and not value > 0:
        raise typer.BadParameter(f"expected a number above 0, got {value:g}")
    return value

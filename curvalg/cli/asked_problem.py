"""The options of every command that makes a problem, and the problem that they ask for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from curvalg.cli.completion import complete_problem

if TYPE_CHECKING:  # importing them would import torch for every command
    from curvalg.cli.made_problems.remake import Changes
    from curvalg.cli.report import Report
    from curvalg.lowering import CurvatureOperator
    from curvalg.problem import Problem

_PANEL = "Problem"

NAME_HELP = (
    "digits, digits-cnn, or your own: module:name (looked for in the current folder first) or path/to/file.py:name, of a "
    "function that returns a curvalg.Problem, or of a Problem. Under torchrun the function takes group, the process group."
)


class SampleKind(StrEnum):
    """What one sample is, by the names of :class:`curvalg.Problem`."""

    item = "item"
    position = "position"


class Precision(StrEnum):
    """Floating-point types, by their names in torch."""

    float64 = "float64"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(frozen=True, kw_only=True)
class ProblemOptions:
    """How a problem is to be made, whatever it is called."""

    arguments: Annotated[
        list[str],
        typer.Option(
            "--arg",
            metavar="NAME=VALUE",
            help="Argument of the function that makes the problem, such as width=64; a Python literal, else text. Repeatable.",
            rich_help_panel=_PANEL,
        ),
    ] = field(default_factory=list)
    params: Annotated[
        list[str],
        typer.Option(
            metavar="PATTERN",
            help="Parameters to take, by name or pattern, such as '*.weight'; by default those of the problem. Repeatable.",
            rich_help_panel=_PANEL,
        ),
    ] = field(default_factory=list)
    samples: Annotated[
        SampleKind | None,
        typer.Option(
            help="What one sample is: a row of a batch, or a position of a row, as a token.", rich_help_panel=_PANEL
        ),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="Where to compute, such as cpu or cuda:0.", rich_help_panel=_PANEL),
    ] = None
    dtype: Annotated[
        Precision | None,
        typer.Option(help="Precision of parameters and floating-point data.", rich_help_panel=_PANEL),
    ] = None
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            help="Seed of torch while the problem is made, and of random vectors.",
            rich_help_panel=_PANEL,
        ),
    ] = 0

    def made(self, name: str, report: Report, more: list[str] | None = None) -> Problem:
        """The problem of a name, with these options.

        Args:
            name: as :data:`NAME_HELP` says.
            report: of the command.
            more: arguments beside those of ``--arg``.

        Raises:
            ProblemError: a name that leads to no problem, or options that do not fit it.
        """
        from curvalg.cli.made_problems.arguments import parsed
        from curvalg.cli.made_problems.load import load_problem
        from curvalg.cli.made_problems.remake import remade

        with self.seeded(name, report):
            problem = load_problem(name, report.group, parsed([*self.arguments, *(more or [])]))
            return remade(problem, self.changes, report.group)

    @property
    def changes(self) -> Changes:
        """What is to be another than the function made it."""
        import torch

        from curvalg.cli.made_problems.remake import Changes

        dtype = None if self.dtype is None else getattr(torch, self.dtype.value)
        return Changes(tuple(self.params), None if self.samples is None else self.samples.value, self.device, dtype)

    @contextmanager
    def seeded(self, name: str, report: Report) -> Iterator[None]:
        """The context in which something is loaded: torch draws from the seed, and the caller's state stays."""
        import torch

        with report.progress(f"loading {name}"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            yield


@dataclass(frozen=True, kw_only=True)
class AskedProblem(ProblemOptions):
    """The one problem of a command."""

    problem: Annotated[
        str,
        typer.Option(
            "--problem", "-p", metavar="NAME", help=NAME_HELP, autocompletion=complete_problem, rich_help_panel=_PANEL
        ),
    ]

    def load(self, report: Report) -> Problem:
        """The problem that the command asks for.

        Args:
            report: of the command.

        Raises:
            ProblemError: a name that leads to no problem, or options that do not fit it.
        """
        return self.made(self.problem, report)

    def lower(self, expression: str, report: Report) -> CurvatureOperator:
        """The operator of an expression on the problem; an expression that cannot be read is refused before that is made.

        Args:
            expression: the text.
            report: of the command.

        Raises:
            CurvalgError: an expression that cannot be read, or not be lowered on this problem.
        """
        from curvalg import parse

        expr = parse(expression)
        problem = self.load(report)
        with report.progress(f"lowering {expression}"):
            return expr.lower(problem)


@dataclass(frozen=True, kw_only=True)
class PossibleProblem(AskedProblem):
    """The problem of a command that can do without one: an empty name."""

    problem: Annotated[
        str,
        typer.Option(
            "--problem",
            "-p",
            metavar="NAME",
            help=NAME_HELP,
            autocompletion=complete_problem,
            rich_help_panel=_PANEL,
            show_default=False,
        ),
    ] = ""

    @property
    def given(self) -> bool:
        """Whether there is a problem to ask for.

        Raises:
            ProblemError: there is none, but options of one.
        """
        if not self.problem and self != type(self)():
            from curvalg.errors import ProblemError

            raise ProblemError(
                "--arg, --params, --samples, --device, --dtype and --seed are of a problem; add --problem NAME"
            )
        return bool(self.problem)


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer, with the fields of each parameter that is a data class as options of its own.

    Args:
        command: a function; its parameters that are data classes are made of their options when it is called.

    >>> @spread
    ... def show(problem: AskedProblem) -> None: ...
    >>> list(inspect.signature(show).parameters)
    ['problem', 'arguments', 'params', 'samples', 'device', 'dtype', 'seed']
    """
    signature = inspect.signature(command, eval_str=True)
    kinds: dict[str, Any] = {n: p.annotation for n, p in signature.parameters.items() if is_dataclass(p.annotation)}
    own = [p.replace(kind=p.KEYWORD_ONLY) for name, p in signature.parameters.items() if name not in kinds]
    shared = [option for kind in kinds.values() for option in _options(kind)]

    @wraps(command)
    def call(**given: Any) -> None:
        whole = {name: kind(**{f.name: given.pop(f.name) for f in fields(kind)}) for name, kind in kinds.items()}
        command(**given, **whole)

    parameters = [*own, *shared]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}  # typer reads both
    return call


def _options(kind: Any) -> list[inspect.Parameter]:
    """The fields of a data class as parameters of a function."""
    hints = get_type_hints(kind, include_extras=True)
    found = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=_default(f), annotation=hints[f.name])
        for f in fields(kind)
    ]
    return sorted(found, key=lambda p: p.default is not p.empty)  # what must be given is named first


def _default(option: Any) -> Any:
    if option.default_factory is not MISSING:
        return option.default_factory()
    return inspect.Parameter.empty if option.default is MISSING else option.default

"""Reports of commands: results to stdout, progress and errors to stderr, and the exit code.

Exit codes: 0 success, 1 a failure while computing, 2 input that cannot be used, 3 interrupted with a partial result.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.text import Text

from curvalg.errors import CurvalgError, CurvalgWarning, ExpressionError, FactsError

if TYPE_CHECKING:  # importing it would import torch for every command
    from pathlib import Path

    from matplotlib.figure import Figure

    from curvalg.distributed.launched import Launched
    from curvalg.estimate import Result
    from curvalg.lowering import CurvatureOperator

FAILED = 1
"""Exit code of a failure while computing."""
BAD_INPUT = 2
"""Exit code of an expression, name, problem or option that cannot be used; the same as for an unknown flag."""

PARTIAL = 3
"""Exit code after Ctrl-C, when what is known so far was printed."""

_PIPE_WIDTH = 120


class Report:
    """What one call of the command line prints, apart from its result.

    Args:
        show_traceback: print the traceback of an error before its message.
        processes: those that run the command together; None: this one alone.
    """

    def __init__(self, show_traceback: bool = False, processes: Launched | None = None) -> None:
        self.show_traceback = show_traceback
        self._processes = processes

    @property
    def group(self) -> Any:
        """The process group that the command runs on; None: one process."""
        return None if self._processes is None else self._processes.group

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files."""
        return self._processes is None or self._processes.exchange.rank == 0

    @contextmanager
    def exits(self, code: int) -> Iterator[None]:
        """Turn an error of the library inside into its message and this exit code.

        Any other exception was not foreseen: it is named as such, and exits with :data:`FAILED`. Other processes are told.
        """
        try:
            with nullcontext() if self._processes is None else self._processes.exchange.telling():
                yield
        except CurvalgError as error:
            self.print_error(error, str(error))
            # What an operator or a flag cannot be is known before anything is computed, wherever it is found out.
            raise typer.Exit(BAD_INPUT if isinstance(error, (ExpressionError, FactsError)) else code) from error
        except typer.Exit:
            raise
        except Exception as error:
            hint = "" if self.show_traceback else "\n(where: repeat the command as curvalg --traceback ...)"
            self.print_error(error, f"unexpected {type(error).__name__}: {error}{hint}")
            raise typer.Exit(FAILED) from error

    def print_error(self, error: Exception, message: str) -> None:
        """Print a message to stderr, with the traceback where that is asked for."""
        if self.show_traceback:
            traceback.print_exception(error, file=sys.stderr)
        # Text, not markup: messages quote lists and types in square brackets. No wrapping: carets point into lines.
        stderr = Console(stderr=True)
        stderr.print(Text.assemble(("error: ", "bold red"), (message, "red")), soft_wrap=True)

    def check_files(self, *, plot: Path | None = None, out: Path | None = None, page: Path | None = None) -> None:
        """Raise, before anything is computed, for files that could not be written.

        Args:
            plot: of ``--plot``.
            out: of ``--out``.
            page: of ``--out``, where that is HTML with pictures.

        Raises:
            ProblemError: an unknown suffix, or a place where no file can be made.
            CurvalgError: matplotlib is not installed.
        """
        if plot is not None and self.writes:
            from curvalg.cli.written.figures import check_path

            check_path(plot)
        if out is not None and self.writes:
            from curvalg.cli.written.result_file import check_place

            check_place(out)
        if page is not None and self.writes:
            from curvalg.cli.written.figures import check_page

            check_page(page)

    def save_result(
        self, result: Result, path: Path | None, op: CurvatureOperator, problem: str, *, quiet: bool
    ) -> None:
        """Write a result to the file of ``--out``, and say so unless stdout is for programs.

        Args:
            result: what was computed; all processes that share the problem call this.
            path: of the file; None: none was asked for.
            op: what it is of.
            problem: its name.
            quiet: say nothing.
        """
        if path is None:
            return
        from curvalg.cli.written.result_file import write

        write(path, result, op, {"expression": str(op.expr), "problem": problem})
        if not quiet:
            typer.echo(f"result: {path}")

    def save_picture(self, figure: Figure, path: Path, *, quiet: bool) -> None:
        """Write a picture, and say so unless stdout is for programs.

        Args:
            figure: of matplotlib.
            path: of ``--plot``.
            quiet: say nothing.
        """
        if self.writes:
            figure.savefig(path)
        if not quiet:
            typer.echo(f"picture: {path}")

    def finish(self, result: Result) -> None:
        """End with the exit code of a partial result, where it is one."""
        if result.partial:
            raise typer.Exit(PARTIAL)

    @property
    def on_terminal(self) -> bool:
        """Whether output goes to a terminal: progress bars are for terminals."""
        return Console(stderr=True).is_terminal

    @contextmanager
    def progress(self, message: str) -> Iterator[Callable[[str], None]]:
        """A spinner on a terminal, nothing on a pipe; yields a function that changes its text."""
        stderr = Console(stderr=True)
        if not stderr.is_terminal:
            yield lambda _: None
            return
        with stderr.status(message) as status:
            yield lambda text: status.update(text)


def stdout() -> Console:
    """The console that results go to.

    A pipe has no width of its own; rich would assume 80 columns, which folds most tables. COLUMNS says otherwise.
    """
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=_PIPE_WIDTH)


def prepare_streams() -> None:
    """Make stdout and stderr fit for people: for the whole process, so only the entry point calls it.

    A character that the terminal's encoding lacks (λ, ‖) becomes a question mark instead of an error, and a warning of
    the library is one line without the place in its source that raised it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    default = warnings.formatwarning

    def shown(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if issubclass(category, CurvalgWarning):
            return f"warning: {message}\n"
        return default(message, category, filename, lineno, line)

    warnings.formatwarning = shown

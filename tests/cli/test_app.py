"""What all commands share: help, version, exit codes, and how errors look."""

from __future__ import annotations

import subprocess
import sys

import pytest

from curvalg import __version__

NAMES = (
    *("terms", "explain", "plan", "eigs", "density", "estimate", "diagonal", "influence", "landscape", "compare"),
    *("report", "doctor"),
)


def test_help_names_every_command(run, commands) -> None:
    result = run("--help")
    assert set(commands) == set(NAMES)
    assert result.exit_code == 0
    assert all(command in result.stdout for command in NAMES)


@pytest.mark.parametrize("command", NAMES)
def test_every_command_has_help(run, command: str) -> None:
    assert run(command, "--help").exit_code == 0


def test_version(run) -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"curvalg {__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["eigs", "--help"], ["terms"], ["explain", "ggn"]])
def test_heavy_libraries_are_imported_only_when_needed(arguments: list[str]) -> None:
    code = f"""
import sys
from curvalg.cli.app import app
app({arguments!r}, standalone_mode=False)
heavy = sorted({{"torch", "matplotlib", "sklearn", "scipy", "numpy"}} & set(sys.modules))
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_error_is_one_clean_message_in_a_process_of_its_own(process) -> None:
    done = process("terms", "hesian")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no term is called 'hesian' (did you mean 'hessian'")
    assert "Traceback" not in done.stderr


def test_traceback_on_demand_with_the_same_exit_code(process) -> None:
    done = process("--traceback", "terms", "hesian")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "error: no term is called 'hesian'" in done.stderr


def test_a_terminal_without_greek_letters(process) -> None:
    done = process("terms", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "hessian" in done.stdout


def test_unforeseen_errors_say_how_to_see_where(run, tiny, inside) -> None:
    inside(solve_of_commands=lambda *_, **__: 1 / 0)
    result = run("eigs", "ggn", "--problem", tiny, "--k", 1)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: unexpected ZeroDivisionError: division by zero\n")
    assert "--traceback" in result.stderr


def test_brackets_in_messages_are_not_markup(run) -> None:
    result = run("eigs", "ggn[bold]", "--problem", "digits")
    assert result.exit_code == 2
    assert "ggn[bold]" in result.stderr


def test_progress_is_for_terminals(run, tiny, monkeypatch) -> None:
    assert run("explain", "ggn", "--problem", tiny).stderr == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes a pipe for a terminal
    assert "loading" in run("explain", "ggn", "--problem", tiny).stderr

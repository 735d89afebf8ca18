"""What ``--problem`` and ``--arg`` accept: functions and Problems, of modules and of files, with arguments."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

SIZED = """
    import torch
    from curvalg import Problem

    def make(width, loss="mean", *, scale=1.0):
        model = torch.nn.Linear(width, 2, bias=False)
        data = (scale * torch.eye(width), torch.zeros(width, 2))
        return Problem(model, torch.nn.MSELoss(reduction=loss), data)

    ready = make(3)
    number = 3

    def anything(**options):
        return make(**options)

    def raises(width=1):
        return [][width]
"""


@pytest.fixture
def sized(module) -> str:
    """A module with functions of arguments, and a Problem."""
    return module(SIZED)


def shape(result) -> list[int]:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["shape"]


@pytest.mark.parametrize(
    ("attribute", "arguments", "size"),
    [
        ("make", ["--arg", "width=4"], 8),
        ("make", ["--arg", "width=2", "--arg", "loss=sum", "--arg", "scale=0.5"], 4),
        ("anything", ["--arg", "width=5"], 10),
        ("ready", [], 6),
    ],
)
def test_functions_with_arguments_and_problems(run, sized, attribute: str, arguments: list[str], size: int) -> None:
    result = run("eigs", "ggn", "-p", f"{sized}:{attribute}", "--k", 1, "--json", *arguments)
    assert shape(result) == [size, size]


def test_arguments_reach_the_function_as_literals_or_text(run, sized) -> None:
    def largest(*arguments: object) -> float:
        result = run("eigs", "ggn", "-p", f"{sized}:make", "--arg", "width=2", "--k", 1, "--json", *arguments)
        return json.loads(result.stdout)["eigenvalues"][0]

    # The GGN of Σ ‖W x‖² is 2 scale² I; a mean divides by the four numbers of the output.
    assert largest("--arg", "loss=sum") == pytest.approx(2)
    assert largest("--arg", "loss='sum'", "--arg", "scale=3") == pytest.approx(18)
    assert largest() == pytest.approx(0.5)


def test_a_file_anywhere_with_what_lies_beside_it(run, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "models"
    folder.mkdir(parents=True)
    (folder / "beside_the_problem.py").write_text("WIDTH = 4\n")
    (folder / "make.py").write_text(
        textwrap.dedent(SIZED) + "\ndef wide():\n    from beside_the_problem import WIDTH\n    return make(WIDTH)\n"
    )
    for place in ("deep/models/make.py", str(folder / "make.py")):
        assert shape(run("eigs", "ggn", "-p", f"{place}:wide", "--k", 1, "--json")) == [8, 8]


def test_two_files_of_one_name_are_two(run, tmp_path: Path) -> None:
    for width in (2, 3):
        (tmp_path / f"of{width}").mkdir()
        (tmp_path / f"of{width}" / "make.py").write_text(textwrap.dedent(SIZED) + f"\nmine = make({width})\n")
    sizes = [shape(run("eigs", "ggn", "-p", f"of{n}/make.py:mine", "--k", 1, "--json"))[0] for n in (2, 3)]
    assert sizes == [4, 6]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("{m}:make", ["--arg", "wdth=4"], "no argument 'wdth' (did you mean 'width'?); its signature is (width, loss="),
        ("{m}:make", [], "needs width; its signature is (width, loss='mean', *, scale=1.0). Pass --arg width=..."),
        ("{m}:make", ["--arg", "width"], "--arg is NAME=VALUE with a Python name, such as --arg width=64; got 'width'"),
        ("{m}:make", ["--arg", "width=1", "--arg", "width=2"], "--arg width is given twice, as 1 and as 2"),
        ("{m}:ready", ["--arg", "width=1"], "is a Problem already, so that --arg has no function to go to"),
        ("{m}:number", [], "is a int; expected a function that returns a curvalg.Problem"),
        ("{m}:mak", [], "has no mak (did you mean 'make'?); it defines make, ready, anything, raises"),
        ("{m}:raises", [], "IndexError: list index out of range"),
        ("digits", ["--arg", "width=1"], "digits has no argument 'width'; its signature is (group"),
        ("nowhere/make.py:make", [], "there is no file nowhere/make.py"),
        ("{m}x.py:make", [], "the files of Python there are"),
        ("{m}.py:", [], "does not say what to take of {m}.py; it defines make, ready, anything, raises"),
    ],
)
def test_names_and_arguments_that_are_wrong(run, sized, name: str, arguments: list[str], message: str) -> None:
    result = run("eigs", "ggn", "-p", name.format(m=sized), *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message.format(m=sized) in result.stderr
    assert "Traceback" not in result.stderr


def test_a_file_that_cannot_be_run_says_where(run, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("x = 1\n1 / 0\n")
    result = run("eigs", "ggn", "-p", "broken.py:make")
    assert result.exit_code == 2
    assert "broken.py failed with ZeroDivisionError: division by zero" in result.stderr and "line 2" in result.stderr

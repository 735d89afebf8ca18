"""The command line in this process (fast) and in one of its own (where imports or exit codes matter)."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from curvalg import Problem
from curvalg.cli.app import app

TINY = """
    import torch
    from curvalg import Problem

    def make():
        draw = torch.Generator().manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3)).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        X = torch.randn(20, 4, generator=draw, dtype=torch.float64)
        y = torch.arange(20) % 3
        return Problem(model, torch.nn.CrossEntropyLoss(), [(X[:7], y[:7]), (X[7:], y[7:])])
"""
# What makes rich take a pipe for a terminal, or for one of another width.
TERMINAL = ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS")
_numbers = itertools.count()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """``run("eigs", "ggn", ...)`` in an empty folder; a result with exit_code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])  # commands put the current folder in front
    for name in TERMINAL:
        monkeypatch.delenv(name, raising=False)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def commands() -> dict[str, Any]:
    """The commands by name, as typer has made them."""
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.fixture
def module(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """``module(source)`` writes an importable module into the folder of ``run`` and returns its name."""
    written: list[str] = []

    def write(source: str) -> str:
        written.append(f"curvalg_cli_case_{os.getpid()}_{next(_numbers)}")
        (tmp_path / f"{written[-1]}.py").write_text(textwrap.dedent(source))
        return written[-1]

    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.fixture
def tiny(module: Callable[[str], str]) -> str:
    """``--problem`` of a small classifier: 27 parameters, three classes, float64, two batches."""
    return f"{module(TINY)}:make"


@pytest.fixture
def tiny_problem() -> Problem:
    """The problem behind ``tiny``."""
    namespace: dict[str, Callable[[], Problem]] = {}
    exec(textwrap.dedent(TINY), namespace)
    return namespace["make"]()


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``process("terms", PYTHONPATH=...)``: a fresh interpreter running the command line in an empty folder."""

    def start(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if name not in TERMINAL}
        return subprocess.run(
            [sys.executable, "-m", "curvalg.cli", *arguments],
            cwd=tmp_path,
            env={**inherited, "PYTHONIOENCODING": "utf-8", **environment},
            capture_output=True,
            encoding="utf-8",
            timeout=120,
            check=False,
        )

    return start

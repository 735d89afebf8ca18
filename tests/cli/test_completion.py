"""What the shell offers: terms inside an expression, and problems of files that are read, not run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.built_in import BUILT_IN

FILE = """
import torch
from curvalg import Problem

open("run", "w").close()

def make(width=3): ...

def _hidden(): ...

ready = Problem(None, None, None)
other = dict()
"""


@pytest.fixture
def offered(process, tmp_path: Path):
    """(words of a command line, the last one incomplete) -> what fish would offer."""

    def offer(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" if " " in word else word for word in words)
        environment = {
            "_CURVALG_COMPLETE": "complete_fish",
            "_TYPER_COMPLETE_ARGS": f"curvalg {line}",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        }
        done = process(**environment)
        assert done.returncode == 0, done.stderr
        return [entry.split("\t")[0] for entry in done.stdout.splitlines() if entry]

    return offer


def test_terms_in_expressions(offered) -> None:
    assert offered("eigs", "hess") == ["hessian", "hessian_diagonal", "hessian_fd"]
    assert {"ggn", "ggn_mc"} <= set(offered("explain", "gg"))
    assert "inverse" in offered("diagonal", "inv")


def test_terms_to_describe(offered) -> None:
    assert offered("terms", "kf") == ["kfac", "kfoc"]


def test_problems_of_files_and_folders(offered, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "make.py").write_text(FILE)
    (tmp_path / "make_here.py").write_text(FILE)
    (tmp_path / "broken.py").write_text("def (")
    assert offered("eigs", "ggn", "-p", "dig") == list(BUILT_IN) == ["digits", "digits-cnn"]
    assert offered("eigs", "ggn", "--problem", "m") == ["make_here.py:make", "make_here.py:ready", "models/"]
    assert offered("compare", "ggn", "-p", "models/") == ["models/make.py:make", "models/make.py:ready"]
    assert offered("eigs", "ggn", "-p", "models/make.py:ma") == ["models/make.py:make"]
    assert offered("eigs", "ggn", "-p", "models.make:re") == ["models.make:ready"]
    assert offered("eigs", "ggn", "-p", "broken") == []
    assert not (tmp_path / "run").exists(), "files are not run"


def test_completion_imports_no_torch(tmp_path: Path) -> None:
    code = """
import sys
from curvalg.cli.completion import complete_expression, complete_problem
assert complete_expression("ggn +")[0].startswith("ggn +") and complete_problem("")
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_shell_is_set_up_by_an_option(process) -> None:
    done = process("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert done.returncode == 0, done.stderr
    assert "_CURVALG_COMPLETE" in done.stdout

"""``--problem``: the built-in ones, the user's own, and what can be wrong with those."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.support.built_in import BUILT_IN


@pytest.mark.parametrize("name", list(BUILT_IN))
def test_built_in_problems(name: str) -> None:
    before = torch.get_rng_state()
    problem = BUILT_IN[name]()
    assert torch.equal(torch.get_rng_state(), before)
    assert problem.num_samples == 1797
    assert 0 < problem.value() < 0.6  # log 10 = 2.3 untrained
    assert not any(p.grad is not None for p in problem.model.module.parameters())
    rows = [evaluation.sample.rows for evaluation in problem.evaluations(problem.snapshot())]
    assert len(set(rows)) == len(rows) > 1, "batches of uneven size"


@pytest.mark.parametrize("name", list(BUILT_IN))
def test_built_in_problems_are_the_same_whatever_was_drawn_before(name: str) -> None:
    first = BUILT_IN[name]().model.module.state_dict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        second = BUILT_IN[name]().model.module.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_digits_needs_scikit_learn(run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = run("explain", "ggn", "--problem", "digits")
    assert result.exit_code == 2
    assert 'pip install "curvalg[demo]"' in result.stderr


def test_packages_in_the_current_folder(run, tmp_path: Path, module, tiny) -> None:
    name = tiny.split(":")[0]
    package = tmp_path / f"package_{name}"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text((tmp_path / f"{name}.py").read_text())
    result = run("explain", "ggn", "--problem", f"{package.name}.inner:make")
    assert result.exit_code == 0, result.stderr
    for loaded in (package.name, f"{package.name}.inner"):
        del sys.modules[loaded]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "did you mean 'digits'"),
        ("unknown", "expected digits or digits-cnn, or your own as module:function or path/to/file.py:function"),
        ("module:", "module:function or path/to/file.py:function"),
        (":function", "module:function"),
        ("no_such_module_at_all:make", "no module is called 'no_such_module_at_all', neither in"),
        ("no_such_package.inner:make", "no module is called 'no_such_package'"),
        ("builtins:dict", "returned a dict; expected a function"),
    ],
)
def test_names_that_lead_nowhere(run, name: str, message: str) -> None:
    result = run("explain", "ggn", "--problem", name)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


@pytest.mark.parametrize(
    ("source", "attribute", "message"),
    [
        ("import no_such_library", "make", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("x = 1\n1 / 0", "make", ".py, line 2)"),
        ("def make(:", "make", "SyntaxError"),
        ("raise SystemExit('stop')", "make", "SystemExit: stop"),
        ("def make(): ...", "mak", "did you mean 'make'"),
        ("def make(): ...", "make", "returned a NoneType; expected a function that returns a curvalg.Problem"),
        ("make = 3", "make", "is a int"),
        (
            "def make(size, *rest, depth=1): ...",
            "make",
            "needs size; its signature is (size, *rest, depth=1). Pass --arg size=...",
        ),
        ("def make():\n    return [][1]", "make", "IndexError: list index out of range"),
        ("def make():\n    import curvalg\n    curvalg.Problem(None, None, [])", "make", ":make: "),
    ],
)
def test_modules_that_are_wrong(run, module, source: str, attribute: str, message: str) -> None:
    result = run("explain", "ggn", "--problem", f"{module(source)}:{attribute}")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_traceback_shows_the_line_of_the_users_module(process, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def make():\n    return undefined_name\n")
    done = process("--traceback", "explain", "ggn", "--problem", "mine:make")
    assert done.returncode == 2
    assert "return undefined_name" in done.stderr

"""The kit inside pytest: from the command line without a test file, and as a decorator."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from curvalg.testing import CHECKS, ConformanceError, parametrize_terms, pytest_plugin
from tests.support.planted import Squares, WrongShape

ROOT = str(Path(__file__).parents[2])


def _python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _pytest(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    installed = any(entry.name == "curvalg" for entry in metadata.entry_points(group="pytest11"))
    plugin = () if installed else ("-p", "curvalg.testing.pytest_plugin")
    return _python("-m", "pytest", *plugin, "-p", "no:cacheprovider", *arguments, cwd=cwd)


def test_loading_the_plugin_costs_nothing(tmp_path):
    code = (
        "import sys, curvalg, curvalg.testing.pytest_plugin\n"
        "assert 'curvalg.testing' in sys.modules\n"
        "assert not {'torch', 'numpy', 'scipy'} & set(sys.modules)"
    )
    done = _python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_importing_curvalg_loads_no_kit(tmp_path):
    code = "import sys, curvalg\ncurvalg.parse('ggn')\nassert not [m for m in sys.modules if m.startswith(('curvalg.testing', 'pytest'))]"
    done = _python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_registered_terms_from_the_command_line(tmp_path):
    (tmp_path / "test_own.py").write_text("def test_own():\n    assert False\n")
    terms = "ggn_mc(samples=2), no_such_term"
    done = _pytest("-v", "--curvalg-terms", terms, "-k", "value or description or linearity", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    for part in (
        "curvalg::ggn_mc(samples=2)::linearity PASSED",
        "curvalg::no_such_term::value FAILED",
        "no term is called 'no_such_term'",
        "curvalg::no_such_term::linearity SKIPPED",
    ):
        assert part in done.stdout
    assert "test_own" not in done.stdout
    assert "Traceback" not in done.stdout
    assert "parametrize.py" not in done.stdout
    assert "1 failed, 3 passed, 2 skipped" in done.stdout


@pytest.mark.parametrize(
    ("source", "terms", "args"), [("ARGS", "ggn", ["x.py"]), ("TESTPATHS", "ggn", []), ("TESTPATHS", None, ["x.py"])]
)
def test_files_are_collected_if_named_or_without_the_option(source, terms, args):
    config = SimpleNamespace(args=["x.py"], args_source=pytest.Config.ArgsSource[source], getoption=lambda name: terms)
    pytest_plugin.pytest_configure(config)
    assert config.args == args


def test_one_test_for_each_term_and_check():
    @parametrize_terms([Squares(), "ggn"], expected_failures={"blocks": "why"})
    def test(term, check):
        """Never run."""

    names, parameters = test.pytestmark[0].args
    assert names == ("term", "check")
    assert [p.id for p in parameters] == [f"{term}-{check}" for term in ("squares", "ggn") for check in CHECKS]
    marked = [p for p in parameters if p.marks]
    assert [p.values[1].name for p in marked] == ["blocks", "blocks"]
    assert marked[0].marks[0].kwargs == {"reason": "why", "strict": True, "raises": ConformanceError}


def test_an_expected_failure_of_no_check_is_refused_at_once():
    with pytest.raises(ConformanceError, match="no check is called 'bloks'"):
        parametrize_terms(["ggn"], expected_failures={"bloks": "?"})


def test_a_check_fails_or_skips_its_test():
    _, parameters = parametrize_terms([WrongShape()]).args
    checks = {parameter.values[1].name: parameter.values[1] for parameter in parameters}
    with pytest.raises(ConformanceError, match=r"wrong_shape, products: on the problem 'classifier'"):
        checks["products"]()
    with pytest.raises(pytest.skip.Exception, match="see its test 'products'"):
        checks["linearity"]()
    with pytest.raises(pytest.skip.Exception, match="not registered"):
        checks["description"]()
    checks["value"](Squares())

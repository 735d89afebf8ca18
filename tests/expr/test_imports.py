"""Expressions, registry and parsing need no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = """
from curvalg import registry
from curvalg.expr import ALIASES, BUILTIN
from curvalg import parse
registry.names()
for name in [*BUILTIN, *ALIASES]:
    expr = registry.build(name)
    assert parse(str(expr)) == expr
    expr.T.tree(), expr._repr_latex_(), expr.facts(), registry.describe(name)
parse("inverse(ggn + 1e-3*identity) @ block_diagonal({'a': hessian}) - ggn ** 2")
"""


@pytest.mark.parametrize("code", ["import curvalg.expr", "import curvalg.registry", BUILD])
def test_no_torch_and_no_numpy(code: str) -> None:
    check = "\nimport sys\nloaded = {'torch', 'numpy', 'scipy'} & set(sys.modules)\nassert not loaded, loaded"
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", code + check], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_reads_no_metadata() -> None:
    code = (
        "from importlib import metadata\n"
        "def refuse(*a, **k): raise AssertionError('metadata was read')\n"
        "metadata.distributions = metadata.distribution = refuse\n"
        "from curvalg import registry\n"
        "from curvalg import parse\n"
        "assert str(parse('ggn + hessian')) == 'ggn + hessian'\n"
        "assert str(registry.build('empirical_fisher')) == 'covariance'\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

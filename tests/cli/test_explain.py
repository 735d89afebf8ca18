"""``curvalg explain``: the tree of an expression, then what becomes of it."""

from __future__ import annotations

import pytest

from curvalg import parse


@pytest.fixture(autouse=True)
def _free_memory(inside) -> None:
    """What is free is told, and would change from one problem to the next."""
    inside(free_memory=lambda device: 2**30)


def test_tree_and_explanation(run, tiny, tiny_problem) -> None:
    expr = parse("ggn + 1e-3 * identity")
    result = run("explain", "ggn + 1e-3 * identity", "--problem", tiny)
    assert result.exit_code == 0
    assert result.stdout == f"{expr.tree()}\n\n{expr.lower(tiny_problem).explain()}\n"


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("ggn +", "cannot be read"),
        ("gnn", "did you mean 'ggn'"),
        ("ggn + 1", "1"),
        ("ggn @ jacobian", "jacobian"),
        ("restrict(ggn, 'no.such')", "no.such"),
    ],
)
def test_expressions_that_cannot_be_used(run, tiny, expression: str, message: str) -> None:
    result = run("explain", expression, "--problem", tiny)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_the_caret_stays_under_the_place(run) -> None:
    *_, line, caret = (
        run("explain", "ggn + nonsense(1) + hessian", "--problem", "digits").stderr.rstrip("\n").split("\n")
    )
    assert line[caret.index("^") :].startswith("1)")

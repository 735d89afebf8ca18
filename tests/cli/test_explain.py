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


@pytest.mark.parametrize(
    ("expression", "lines"),
    [
        ("2*ggn - ggn + identity", ["ggn + identity", "positive semi-definite: unknown, yes for a convex loss"]),
        ("inverse(inverse(hessian))", ["simplified", "by "]),
        (
            "fisher_mc(samples=3)",
            ["fisher_mc(samples: int = 1, seed: int = 0)", "a loss that is a negative log-likelihood"],
        ),
        ("ggn_class", ["a loss of class labels, for ggn_class", "statistics of the whole data set"]),
        ("centered_covariance", ["a loss of every sample, for centered_covariance"]),
        ("kfac", ["a pass over the data to make its matrix", "parameters x parameters"]),
        ("hessian_fd", ["gradients of the loss alone"]),
        ("jacobian", ["outputs x parameters", "symmetric: no"]),
        ("inverse(ggn + identity)", ["inverse: a factorisation where the structure allows one"]),
    ],
)
def test_without_a_problem(run, expression: str, lines: list[str]) -> None:
    result = run("explain", expression)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(parse(expression).tree() + "\n\nexpression\n")
    for line in lines:
        assert line in result.stdout


def test_without_a_problem_only_what_is_needed_is_named(run) -> None:
    assert "needs" not in run("explain", "identity").stdout
    assert "a loss" not in run("explain", "jacobian").stdout
    assert "simplified" not in run("explain", "ggn").stdout
    assert run("explain", "gnn").exit_code == 2


def test_options_of_a_problem_need_one(run) -> None:
    result = run("explain", "ggn", "--dtype", "float64")
    assert result.exit_code == 2
    assert "--dtype and --seed are of a problem; add --problem NAME" in result.stderr

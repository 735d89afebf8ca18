"""``curvalg eigs``: the right numbers, true residuals, and clear refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence

from curvalg import Problem, parse


def _dense(expression: str, problem: Problem) -> np.ndarray:
    return np.linalg.eigvalsh(parse(expression).lower(problem).to_dense().numpy())[::-1]


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("expression", ["hessian", "2*ggn - hessian/3", "restrict(hessian, '0.*')"])
def test_json_agrees_with_the_dense_matrix(run, tiny, tiny_problem, expression: str, which: str) -> None:
    result = run("eigs", expression, "--problem", tiny, "--k", 4, "--which", which, "--tol", 0, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    exact = _dense(expression, tiny_problem)
    picked = {
        "LA": exact[:4],
        "SA": exact[-4:],
        "LM": np.sort(exact[np.argsort(-np.abs(exact))[:4]])[::-1],
        "BE": np.concatenate([exact[:2], exact[-2:]]),
    }[which]
    np.testing.assert_allclose(found["eigenvalues"], picked, atol=1e-10)
    assert max(found["residuals"]) < 1e-9
    assert found["shape"] == [len(exact)] * 2
    assert found["products"] > 4
    assert (found["expression"], found["which"], found["k"]) == (str(parse(expression)), which, 4)


def test_operators_on_outputs(run, tiny, tiny_problem) -> None:
    found = json.loads(run("eigs", "loss_hessian", "--problem", tiny, "--k", 3, "--tol", 0, "--json").stdout)
    np.testing.assert_allclose(found["eigenvalues"], _dense("loss_hessian", tiny_problem)[:3], atol=1e-10)
    assert found["shape"] == [60, 60]


def test_residuals_are_measured_not_assumed(run, tiny) -> None:
    arguments = ("eigs", "loss_hessian", "--problem", tiny, "--k", 6, "--json")
    loose = json.loads(run(*arguments, "--tol", 0.5).stdout)["residuals"]
    tight = json.loads(run(*arguments, "--tol", 1e-12).stdout)["residuals"]
    assert max(tight) < 1e-9 < max(loose)


def test_the_seed_fixes_everything(run, tiny) -> None:
    def numbers(seed: int) -> tuple[list[float], int]:
        found = json.loads(
            run("eigs", "loss_hessian", "-p", tiny, "-k", 6, "--seed", seed, "--tol", 0.1, "--json").stdout
        )
        return found["residuals"], found["products"]

    assert numbers(1) == numbers(1)
    assert numbers(1) != numbers(2)


def test_table(run, tiny, tiny_problem) -> None:
    result = run("eigs", "ggn", "--problem", tiny, "--k", 3)
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == f"ggn on {tiny}, 27 x 27"
    shown = [float(line.split()[1]) for line in lines if line.split()[:1] in (["1"], ["2"], ["3"])]
    np.testing.assert_allclose(shown, _dense("ggn", tiny_problem)[:3], rtol=1e-5)
    assert "products in" in lines[-1]


@pytest.mark.parametrize("expression", ["jacobian", "hessian @ ggn"])
def test_operators_not_known_to_be_symmetric_are_refused(run, tiny, expression: str) -> None:
    result = run("eigs", expression, "--problem", tiny, "--k", 2)
    assert result.exit_code == 2
    assert "symmetric" in result.stderr
    assert expression in result.stderr


@pytest.mark.parametrize(
    ("k", "which", "message"),
    [(27, "LA", "expected 1 ≤ k ≤ 26"), (1000, "SA", "got 1000"), (1, "BE", "both ends"), (0, "LA", "--k")],
)
def test_k_that_does_not_fit(run, tiny, k: int, which: str, message: str) -> None:
    result = run("eigs", "ggn", "--problem", tiny, "--k", k, "--which", which)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("flags", [["--which", "XX"], ["--tol", "-1"], ["--seed", "-1"], ["--nonsense"]])
def test_flags_that_are_refused(run, tiny, flags: list[str]) -> None:
    assert run("eigs", "ggn", "--problem", tiny, *flags).exit_code == 2


def test_a_loss_that_lacks_what_a_term_needs(run, module) -> None:
    source = """
        import torch
        from curvalg import Problem

        def make():
            return Problem(torch.nn.Linear(3, 2), None, (torch.ones(4, 3), torch.ones(4, 2)))
    """
    result = run("eigs", "ggn", "--problem", f"{module(source)}:make", "--k", 2)
    assert result.exit_code == 2
    assert "loss" in result.stderr


def test_failures_while_computing_exit_with_one(run, module) -> None:
    source = """
        import torch
        from curvalg import Problem

        def make():
            model = torch.nn.Linear(3, 2)
            torch.nn.init.constant_(model.weight, float("nan"))
            return Problem(model, torch.nn.CrossEntropyLoss(), (torch.ones(4, 3), torch.zeros(4, dtype=torch.long)))
    """
    result = run("eigs", "ggn", "--problem", f"{module(source)}:make", "--k", 2)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "finite" in result.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ArpackNoConvergence("no", np.ones(1), np.ones((27, 1))), "1 of 3 eigenvalues reached tol=0.0001"),
        (ArpackError(-9), "ARPACK stopped"),
    ],
)
def test_an_eigensolver_that_gives_up(run, tiny, monkeypatch, error: Exception, message: str) -> None:
    def give_up(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("curvalg.cli.eigs.eigsh", give_up)
    result = run("eigs", "ggn", "--problem", tiny, "--k", 3)
    assert result.exit_code == 1
    assert message in result.stderr


def test_the_zero_matrix_is_an_answered_failure(run, tiny) -> None:
    result = run("eigs", "ggn - ggn", "--problem", tiny, "--k", 2)
    assert result.exit_code == 1
    assert "ARPACK stopped after 1 products" in result.stderr

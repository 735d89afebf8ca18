"""``curvalg eigs``: the right numbers, true residuals, and clear refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from curvalg import ConvergenceError, Problem, parse


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
    assert found["method"] == "exact" and found["partial"] is False
    assert (found["expression"], found["which"], found["k"]) == (str(parse(expression)), which, 4)


def test_operators_on_outputs(run, tiny, tiny_problem) -> None:
    found = json.loads(run("eigs", "loss_hessian", "--problem", tiny, "--k", 3, "--tol", 0, "--json").stdout)
    np.testing.assert_allclose(found["eigenvalues"], _dense("loss_hessian", tiny_problem)[:3], atol=1e-10)
    assert found["shape"] == [60, 60]


def test_residuals_are_measured_not_assumed(run, tiny, inside) -> None:
    arguments = ("eigs", "loss_hessian", "--problem", tiny, "--k", 6, "--json")
    inside(small_eigenproblem=lambda *_: None)  # by Lanczos
    loose = json.loads(run(*arguments, "--tol", 0.5).stdout)["residuals"]
    tight = json.loads(run(*arguments, "--tol", 1e-12).stdout)["residuals"]
    assert max(tight) < 1e-9 < max(loose)


def test_the_seed_fixes_everything_but_the_measured_width_of_blocks(run, tiny, inside) -> None:
    inside(choose_width=lambda *_, **__: 1)
    inside(small_eigenproblem=lambda *_: None)

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
    assert lines[-1].startswith("exact, ")


@pytest.mark.parametrize(("expression", "message"), [("jacobian", "square"), ("hessian @ ggn", "symmetric")])
def test_operators_not_known_to_be_symmetric_are_refused(run, tiny, expression: str, message: str) -> None:
    result = run("eigs", expression, "--problem", tiny, "--k", 2)
    assert result.exit_code == 2
    assert message in result.stderr
    assert expression in result.stderr


@pytest.mark.parametrize(
    ("k", "which", "message"),
    [(28, "LA", "expected 1 ≤ k ≤ 27"), (1000, "SA", "got k=1000"), (0, "LA", "--k")],
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


def test_an_eigensolver_that_gives_up(run, tiny, inside) -> None:
    def give_up(*_: object, **__: object) -> None:
        raise ConvergenceError("1 of 3 eigenpairs reached tol=0.0001", None)

    inside(eigsh_of_commands=give_up)
    result = run("eigs", "ggn", "--problem", tiny, "--k", 3)
    assert result.exit_code == 1
    assert "1 of 3 eigenpairs" in result.stderr


def test_the_zero_matrix_has_eigenvalues_zero(run, tiny) -> None:
    found = json.loads(run("eigs", "ggn - ggn", "--problem", tiny, "--k", 2, "--json").stdout)
    assert found["eigenvalues"] == [0, 0]


def test_a_run_goes_on_from_its_file(run, tiny, tmp_path, inside) -> None:
    inside(small_eigenproblem=lambda *_: None)
    arguments = ("eigs", "hessian", "--problem", tiny, "--k", 3, "--json", "--checkpoint", "run.safetensors")
    first = json.loads(run(*arguments).stdout)
    assert (tmp_path / "run.safetensors").exists()
    again = json.loads(run(*arguments).stdout)
    assert again["eigenvalues"] == first["eigenvalues"] and again["products"] == first["products"]
    other = run("eigs", "ggn", "--problem", tiny, "--k", 3, "--checkpoint", "run.safetensors")
    assert other.exit_code == 1 and "expression differs" in other.stderr


def test_an_interruption_prints_what_is_known_and_exits_with_three(run, tiny, inside, products) -> None:
    inside(small_eigenproblem=lambda *_: None)
    products.interrupt(13)
    result = run("eigs", "hessian", "--problem", tiny, "--k", 2)
    assert result.exit_code == 3
    assert "interrupted: partial result" in result.stdout

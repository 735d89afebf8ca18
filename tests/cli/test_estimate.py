"""``curvalg estimate`` and ``curvalg density``: the library's numbers, as tables and as JSON, and clear refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from curvalg import parse


def dense(expression: str, problem) -> torch.Tensor:
    return parse(expression).lower(problem).to_dense()


def share(A: torch.Tensor) -> torch.Tensor:
    return (A @ torch.linalg.inv(A + torch.eye(len(A)).double() / 10)).trace()


@pytest.mark.parametrize(
    ("quantity", "expression", "flags", "exact"),
    [
        ("trace", "hessian", (), torch.trace),
        ("norm", "hessian", (), torch.linalg.norm),
        ("logdet", "ggn + 0.1*identity", (), torch.logdet),
        ("effective-dimension", "ggn", ("--damping", 0.1), share),
    ],
)
def test_json_agrees_with_the_dense_matrix(run, tiny, tiny_problem, quantity, expression, flags, exact) -> None:
    result = run("estimate", quantity, expression, "--problem", tiny, *flags, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert abs(found["value"] - float(exact(dense(expression, tiny_problem)))) <= 4 * found["error"] + 1e-8
    assert (found["quantity"], found["expression"], found["partial"]) == (quantity, str(parse(expression)), False)


def test_tic_takes_the_hessian_as_its_expression(run, tiny, tiny_problem) -> None:
    found = json.loads(run("estimate", "tic", "ggn", "-p", tiny, "--damping", 0.1, "--json").stdout)
    A, C = dense("ggn", tiny_problem) + torch.eye(27).double() / 10, dense("covariance", tiny_problem)
    assert found["value"] == pytest.approx(float(torch.linalg.solve(A, C).trace()))


def test_a_line_for_people(run, tiny) -> None:
    result = run("estimate", "trace", "ggn", "--problem", tiny)
    assert result.exit_code == 0
    first, value, cost = result.stdout.splitlines()
    assert first == f"trace of ggn on {tiny}" and value.endswith("(exact)") and cost.startswith("exact")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trac", "ggn"), "did you mean 'trace'"),
        (("trace", "ggn", "--damping", 1), "--damping is for"),
        (("effective-dimension", "ggn"), "pass --damping"),
        (("logdet", "ggn"), "positive definite"),
        (("trace", "jacobian"), "square"),
        (("trace", "ggn +"), "ggn +"),
        (("trace", "ggn", "--tol", -1), "--tol"),
    ],
)
def test_refusals(run, tiny, arguments, message) -> None:
    result = run("estimate", *arguments, "--problem", tiny)
    assert result.exit_code == 2
    assert message in result.stderr and result.stdout == ""


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_density_as_json_and_as_a_picture(run, tiny, scale, tmp_path) -> None:
    arguments = ("density", "hessian", "--problem", tiny, "--scale", scale, "--plot", "d.png", "--json")
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    grid = np.array(found["grid"])
    axis = np.log10(grid) if scale == "log" else grid
    assert torch.trapezoid(torch.tensor(found["density"]), torch.from_numpy(axis)) == pytest.approx(1, abs=0.02)
    assert (tmp_path / "d.png").stat().st_size > 10_000


def test_quantiles_are_those_of_the_spectrum(run, tiny, tiny_problem) -> None:
    result = run("density", "hessian", "--problem", tiny)
    rows = [line.split() for line in result.stdout.splitlines() if "%" in line]
    values = np.linalg.eigvalsh(dense("hessian", tiny_problem).numpy())
    assert len(rows) == 7
    for share, value in rows:
        rank = int(np.ceil(float(share.rstrip("%")) / 100 * 27 - 1e-9))
        assert float(value) == pytest.approx(values[max(rank, 1) - 1], rel=1e-3, abs=1e-9)


def test_density_of_a_rectangular_operator_is_refused(run, tiny) -> None:
    result = run("density", "jacobian", "--problem", tiny)
    assert result.exit_code == 2 and "square" in result.stderr

"""``curvalg landscape`` and ``curvalg compare``: losses and estimates of the library, beside plain torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from curvalg import parse

QUADRATIC = """
    import torch
    from curvalg import Problem

    def make(scale=1.0, at=1.0):
        model = torch.nn.Linear(3, 1, bias=False).double()
        with torch.no_grad():
            model.weight.fill_(at)
        X = scale * torch.diag(torch.tensor([3.0, 2.0, 1.0])).double()
        return Problem(model, torch.nn.MSELoss(reduction="sum"), (X, torch.zeros(3, 1, dtype=torch.float64)))

    shared = make()

    def none():
        return Problem(torch.nn.Linear(3, 1), None, (torch.ones(2, 3), torch.ones(2, 1)))
"""


@pytest.fixture
def quadratic(module) -> str:
    """L(w) = 9 w₁² + 4 w₂² + w₃² at w = (1, 1, 1), whose Hessian is diag(18, 8, 2)."""
    return module(QUADRATIC)


def losses(run, *arguments: object) -> tuple[np.ndarray, np.ndarray, dict]:
    result = run("landscape", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    return np.array(found["steps"]), np.array(found["losses"]), found


def test_a_line_along_the_top_eigenvector(run, quadratic) -> None:
    steps, found, record = losses(run, "-p", f"{quadratic}:make", "--along", "hessian", "--points", 5, "--reach", 2)
    assert steps.tolist() == [-2, -1, 0, 1, 2]
    # The sign of an eigenvector is free: (1 ± a)² 9 + 5.
    expected = 9 * (1 + steps) ** 2 + 5
    assert np.allclose(found, expected) or np.allclose(found, expected[::-1])
    assert record["directions"] == ["eigenvector of 18"]


def test_a_plane_of_two_eigenvectors(run, quadratic) -> None:
    steps, found, record = losses(
        run, "-p", f"{quadratic}:make", "--along", "hessian", "--directions", 2, "--points", 3, "--reach", 0.5
    )
    assert found.shape == (3, 3)
    a, b = np.meshgrid(steps, steps, indexing="ij")
    expected = 9 * (1 + a) ** 2 + 4 * (1 + b) ** 2 + 1
    assert any(np.allclose(found, expected[::i, ::j]) for i in (1, -1) for j in (1, -1))
    assert record["directions"] == ["eigenvector of 18", "eigenvector of 8"]


def test_random_directions_are_as_long_as_the_parameters(run, tiny, tiny_problem) -> None:
    _, found, record = losses(run, "-p", tiny, "--points", 3, "--seed", 4)
    assert found[1] == pytest.approx(tiny_problem.value())
    draw = torch.Generator().manual_seed(4)
    moved = {}
    for name, parameter in tiny_problem.model.chosen.items():
        noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        moved[name] = (noise * parameter.detach().norm() / noise.norm()).clone()
    tiny_problem.step(moved, -1.0)
    assert found[2] == pytest.approx(tiny_problem.value())
    assert record["unit"] == "the length of each parameter tensor"
    other = losses(run, "-p", tiny, "--points", 3, "--seed", 5)[1]
    assert not np.allclose(found, other)


def test_random_directions_are_as_long_as_each_filter(run, tiny, tiny_problem) -> None:
    _, found, record = losses(run, "-p", tiny, "--points", 3, "--seed", 4, "--by", "filter")
    draw = torch.Generator().manual_seed(4)
    moved = {}
    for name, parameter in tiny_problem.model.chosen.items():
        noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        parts = [noise] if noise.ndim == 1 else list(noise)
        wholes = [parameter.detach()] if noise.ndim == 1 else list(parameter.detach())
        rows = [part * (whole.norm() / part.norm()) for part, whole in zip(parts, wholes, strict=True)]
        moved[name] = rows[0] if noise.ndim == 1 else torch.stack(rows)
    tiny_problem.step(moved, -1.0)
    assert found[2] == pytest.approx(tiny_problem.value())
    assert record["unit"].startswith("the length of each filter")


def test_the_parameters_are_the_same_bits_afterwards(run, quadratic) -> None:
    losses(run, "-p", f"{quadratic}:shared", "--points", 7, "--directions", 2)
    weight = sys.modules[quadratic].shared.model.module.weight
    assert torch.equal(weight, torch.ones(1, 3, dtype=torch.float64))


def test_landscapes_for_people(run, quadratic, tmp_path: Path) -> None:
    result = run("landscape", "-p", f"{quadratic}:make", "--points", 4, "--plot", "line.png")
    assert result.exit_code == 0, result.stderr
    assert "picture: line.png" in result.stdout and "a step of 1 is" in result.stdout
    result = run("landscape", "-p", f"{quadratic}:make", "--directions", 2, "--points", 12, "--plot", "plane.svg")
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 120
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("line.png", "plane.svg"))


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("make", ["--along", "loss_hessian"], "a landscape moves all 3 parameters, but loss_hessian acts on 3 numbers"),
        ("make", ["--along", "hesian"], "did you mean 'hessian'"),
        ("none", [], "loss=None"),
        ("make", ["--directions", "3"], "--directions"),
        ("make", ["--plot", "a.docx"], "ends in one of"),
    ],
)
def test_landscapes_that_are_refused(run, quadratic, name: str, more: list[str], message: str) -> None:
    result = run("landscape", "-p", f"{quadratic}:{name}", *more)
    assert result.exit_code in (1, 2)
    assert message in result.stderr


def test_two_problems_side_by_side(run, quadratic) -> None:
    result = run(
        *("compare", "ggn", "-p", f"{quadratic}:make", "-p", f"{quadratic}:make"),
        *("--arg-b", "scale=2", "--arg", "at=0.5", "--k", 2, "--damping", 2, "--json"),
    )
    assert result.exit_code == 0, result.stderr
    first, second = json.loads(result.stdout)["sides"]
    for found, scale in ((first, 1), (second, 4)):
        values = scale * np.array([18.0, 8, 2])
        np.testing.assert_allclose(found["eigenvalues"], values[:2])
        assert found["loss"] == pytest.approx(scale * 14 / 4)
        assert found["trace"]["value"] == pytest.approx(values.sum())
        assert found["effective_dimension"]["value"] == pytest.approx((values / (values + 2)).sum())


def test_other_problems_and_a_table(run, quadratic, tiny, tiny_problem) -> None:
    result = run("compare", "hessian", "-p", f"{quadratic}:make", "-p", tiny, "--k", 3)
    assert result.exit_code == 0, result.stderr
    rows = {
        line.strip().rsplit("  ", 1)[0].split("  ")[0]: line.split()
        for line in result.stdout.splitlines()
        if line.strip()
    }
    top = np.linalg.eigvalsh(parse("hessian").lower(tiny_problem).to_dense().numpy())[-1]
    assert [float(x) for x in rows["eigenvalue 1"][-2:]] == pytest.approx([18, top], rel=1e-4)
    assert [float(x) for x in rows["loss"][-2:]] == pytest.approx([14, tiny_problem.value()], rel=1e-4)
    assert "effective dimension" not in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "digits"], "compare takes two problems, got 1"),
        (["-p", "{m}:make", "-p", "{m}:make", "--arg-a", "x=1"], "has no argument 'x'"),
        (["-p", "{m}:make", "-p", "{m}:make", "--damping", "0.1", "-k", "1"], "semidefinite"),
    ],
)
def test_comparisons_that_are_refused(run, quadratic, options: list[str], message: str) -> None:
    result = run("compare", "residual", *(option.format(m=quadratic) for option in options))
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_landscape_along_nothing_is_refused(run, quadratic) -> None:
    result = run("landscape", "-p", f"{quadratic}:make", "--along", "0*hessian")
    assert result.exit_code != 0
    assert "leave out --along for random directions" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    "command", [("compare", "hessian", "-p", "a", "-p", "b"), ("report", "-p", "a", "--out", "x.html")]
)
def test_a_damping_is_above_zero(run, command) -> None:
    result = run(*command, "--damping", 0)
    assert result.exit_code == 2
    assert "above 0" in result.stderr

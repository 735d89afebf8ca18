"""``curvalg diagonal``: the diagonal by parameter, as a table, as JSON, and whole in a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from curvalg import parse


@pytest.mark.parametrize("expression", ["hessian", "ggn_diagonal", "restrict(ggn, '2.*')"])
def test_json_agrees_with_the_dense_matrix(run, tiny, tiny_problem, tmp_path: Path, expression: str) -> None:
    result = run("diagonal", expression, "-p", tiny, "--json", "--out", "run.npz")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    exact = parse(expression).lower(tiny_problem).to_dense().diagonal().numpy()
    start = 0
    for part in found["parameters"]:
        own = exact[start : start + part["size"]]
        start += part["size"]
        np.testing.assert_allclose(
            [part["least"], part["mean"], part["most"]], [own.min(), own.mean(), own.max()], atol=1e-10
        )
        assert part["share"] == pytest.approx(own.sum() / exact.sum())
        assert part["error"] == 0
    assert start == len(exact)
    assert sum(part["share"] for part in found["parameters"]) == pytest.approx(1)
    with np.load(tmp_path / "run.npz") as kept:
        np.testing.assert_allclose(kept["value"], exact, atol=1e-10)
        assert kept["names"].tolist() == [part["name"] for part in found["parameters"]]


def test_an_estimate_has_errors(run, tiny, tiny_problem) -> None:
    result = run("diagonal", "hessian", "-p", tiny, "--products", 12, "--json")
    found = json.loads(result.stdout)
    assert found["method"] != "exact"
    exact = parse("hessian").lower(tiny_problem).to_dense().diagonal()
    means = {name: float(exact[where].mean()) for name, where in tiny_problem.layout.slices.items()}
    for part in found["parameters"]:
        assert abs(part["mean"] - means[part["name"]]) < 6 * part["error"]
    assert "±" in run("diagonal", "hessian", "-p", tiny, "--products", 12).stdout


def test_a_table_for_people(run, tiny) -> None:
    shown = run("diagonal", "ggn", "-p", tiny).stdout
    assert shown.startswith(f"diagonal of ggn on {tiny}, 27 x 27")
    for word in ("share of trace", "0.weight", "2.bias", "exact"):
        assert word in shown
    assert "±" not in shown


def test_outputs_are_one_row(run, tiny) -> None:
    found = json.loads(run("diagonal", "loss_hessian", "-p", tiny, "--json").stdout)
    assert [part["name"] for part in found["parameters"]] == ["outputs"]


def test_what_is_not_square_is_refused(run, tiny) -> None:
    result = run("diagonal", "jacobian", "-p", tiny)
    assert result.exit_code == 2
    assert "square" in result.stderr

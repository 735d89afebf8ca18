"""``curvalg influence``: scores by hand, queries as data, as a Problem and from functions, and clear refusals."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

SOURCE = """
    import torch
    from curvalg import Problem

    draw = torch.Generator().manual_seed(1)
    X, y = torch.randn(9, 3, generator=draw, dtype=torch.float64), torch.randn(9, 2, generator=draw, dtype=torch.float64)
    asked = (torch.randn(4, 3, generator=draw, dtype=torch.float64), torch.randn(4, 2, generator=draw, dtype=torch.float64))
    weight = torch.randn(2, 3, generator=draw, dtype=torch.float64)

    def problem(data):
        model = torch.nn.Linear(3, 2, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(weight)
        return Problem(model, torch.nn.MSELoss(reduction="sum"), data)

    def make():
        return problem((X, y))

    def make_queries(rows=4):
        return problem(tuple(part[:rows] for part in asked))

    def data():
        return asked

    batches = [(part[0][None], part[1][None]) for part in zip(*asked)]
    other = (torch.ones(3, 5), torch.ones(3, 2))
    empty = [(X[:0], y[:0])]
"""


@pytest.fixture
def linear(module) -> tuple[str, np.ndarray]:
    """A linear least-squares problem, and the scores (queries, samples) of (GGN + 0.1)⁻¹ by hand."""
    made: dict = {}
    exec(textwrap.dedent(SOURCE), made)
    X, y, (Q, t), W = made["X"], made["y"], made["asked"], made["weight"]
    gradients = 2 * torch.einsum("no,ni->noi", X @ W.T - y, X).flatten(1)
    asking = 2 * torch.einsum("qo,qi->qoi", Q @ W.T - t, Q).flatten(1)
    A = torch.kron(torch.eye(2).double(), 2 * X.T @ X) + 0.1 * torch.eye(6).double()
    return module(SOURCE), (asking @ torch.linalg.solve(A, gradients.T)).numpy()


def command(name: str, queries: str, *more: object) -> list[object]:
    return ["influence", "inverse(ggn + 0.1*identity)", "-p", f"{name}:make", "--queries", f"{name}:{queries}", *more]


@pytest.mark.parametrize("queries", ["asked", "batches", "data", "make_queries"])
def test_scores_are_those_by_hand(run, linear, queries: str) -> None:
    name, exact = linear
    result = run(*command(name, queries, "--k", 3, "--json"))
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["scores"]
    assert len(found) == len(exact) == 4
    for row, scores in zip(exact, found, strict=True):
        order = np.argsort(-row)
        for side, samples in (("largest", order[:3]), ("smallest", order[::-1][:3])):
            assert [entry["sample"] for entry in scores[side]] == samples.tolist()
            np.testing.assert_allclose([entry["score"] for entry in scores[side]], row[samples], rtol=1e-8)


def test_arguments_of_queries_and_a_table(run, linear) -> None:
    name, exact = linear
    result = run(*command(name, "make_queries", "--query-arg", "rows=2", "--k", 1))
    assert result.exit_code == 0, result.stderr
    assert "2 queries" in " ".join(result.stdout.split())
    line = next(line.split() for line in result.stdout.splitlines() if line.split()[:1] == ["1"])
    assert line[1] == str(exact[1].argmax()) and line[3] == str(exact[1].argmin())
    assert float(line[2]) == pytest.approx(exact[1].max(), rel=1e-3)


def test_the_precision_is_that_of_the_problem(run, linear) -> None:
    name, exact = linear
    for queries in ("asked", "batches", "make_queries"):
        result = run(*command(name, queries, "--dtype", "float32", "--json", "--k", 1))
        assert result.exit_code == 0, result.stderr
        tops = [scores["largest"][0]["score"] for scores in json.loads(result.stdout)["scores"]]
        np.testing.assert_allclose(tops, exact.max(1), rtol=1e-3)


def test_the_ranking_in_a_file(run, linear, tmp_path: Path) -> None:
    name, exact = linear
    assert run(*command(name, "asked", "--k", 2, "--out", "run.npz")).exit_code == 0
    with np.load(tmp_path / "run.npz") as found:
        np.testing.assert_array_equal(found["topk.largest_samples"][:, 0], exact.argmax(1))


@pytest.mark.parametrize(
    ("queries", "more", "message"),
    [
        ("nothing", [], "has no nothing"),
        ("data", ["--query-arg", "rows=2"], "has no argument 'rows'; its signature is ()"),
        ("other", [], "mat1 and mat2"),
    ],
)
def test_queries_that_do_not_fit(run, linear, queries: str, more: list[str], message: str) -> None:
    result = run(*command(linear[0], queries, *more))
    assert result.exit_code in (1, 2)
    assert message in result.stderr


def test_queries_without_a_sample_are_bad_input(run, linear) -> None:
    result = run(*command(linear[0], "empty"))
    assert result.exit_code == 2, result.stderr
    assert "sample" in result.stderr

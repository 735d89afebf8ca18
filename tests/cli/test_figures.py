"""``curvalg eigs --plot``: a picture that shows something, and paths refused before anything is computed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from curvalg import Problem, parse
from curvalg.cli.written.figures import draw_pairs, tensor_weights


def test_a_picture_of_the_digits(run, tmp_path: Path) -> None:
    result = run("eigs", "ggn + 1e-3 * identity", "--problem", "digits", "--k", 10, "--plot", "demo.png")
    assert result.exit_code == 0, result.stderr
    assert "picture: demo.png" in result.stdout
    pixels = imread(tmp_path / "demo.png")
    assert pixels.shape[1] > 1200
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 50


def test_the_c_minus_one_line(tiny_problem: Problem, figure_of) -> None:
    figure = figure_of("ggn", tiny_problem, k=12)
    assert "C − 1 = 2" in [text.get_text() for text in figure.axes[0].texts]
    assert figure.axes[0].get_yscale() == "log"


def test_mixed_signs_use_a_linear_axis_and_no_line(tiny_problem: Problem, figure_of) -> None:
    figure = figure_of("hessian", tiny_problem, k=6, which="BE")
    assert figure.axes[0].get_yscale() == "linear"
    assert not figure.axes[0].texts


def test_an_operator_on_outputs_has_no_parameter_panel(tiny_problem: Problem, figure_of) -> None:
    assert len(figure_of("loss_hessian", tiny_problem, k=3).axes) == 1


def test_an_expression_that_cannot_be_typeset_is_shown_as_text(tiny_problem: Problem, figure_of, monkeypatch) -> None:
    monkeypatch.setattr("curvalg.Expr._repr_latex_", lambda self: r"$\nosuchcommand{$")
    figure = figure_of("ggn", tiny_problem, k=3)
    figure.canvas.draw()
    assert figure.texts[0].get_text().startswith("ggn on")


@pytest.mark.parametrize("suffix", ["pdf", "svg", "PNG"])
@pytest.mark.parametrize("expression", ["hessian", "restrict(ggn, '0.*') / 3", "1e-3 * ggn @ ggn + 2/7*identity"])
def test_formats_and_formulas(run, tiny, tmp_path: Path, suffix: str, expression: str) -> None:
    result = run("eigs", expression, "--problem", tiny, "--k", 3, "--plot", f"a.{suffix}")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / f"a.{suffix}").stat().st_size > 1000


def test_weights_add_to_one_and_follow_restrictions(tiny_problem: Problem) -> None:
    op = parse("restrict(hessian, ['0.weight', '2.bias'])").lower(tiny_problem)
    names, weights = tensor_weights(op, np.linalg.eigh(op.to_dense().numpy())[1])
    assert names == ["0.weight", "2.bias"]
    np.testing.assert_allclose(weights.sum(0), 1)


def test_many_tensors_are_summed_into_one_row() -> None:
    import torch

    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(20))).double()
    data = (torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64))
    op = parse("ggn").lower(Problem(model, torch.nn.MSELoss(), data))
    names, weights = tensor_weights(op, np.linalg.qr(np.random.default_rng(0).standard_normal((op.shape[0], 3)))[0])
    assert len(names) == 24
    assert names[-1] == "17 others"
    np.testing.assert_allclose(weights.sum(0), 1)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("missing/a.png", "No such file or directory"),
        ("folder.png", "cannot be written to folder.png"),
        ("a.docx", "ends in one of"),
        ("a", "write a.png"),
    ],
)
def test_places_refused_before_anything_is_computed(run, module, tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "folder.png").mkdir()
    name = module("def make():\n    open('computed', 'w').close()")
    result = run("eigs", "ggn", "--problem", f"{name}:make", "--plot", place)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "computed").exists()


def test_a_command_that_fails_leaves_no_picture_and_no_change(run, tmp_path: Path) -> None:
    (tmp_path / "old.png").write_bytes(b"kept")
    for place in ("new.png", "old.png"):
        assert run("eigs", "ggn", "--problem", "nowhere", "--plot", place).exit_code == 2
    assert not (tmp_path / "new.png").exists()
    assert (tmp_path / "old.png").read_bytes() == b"kept"


def test_pictures_need_matplotlib(run, tiny, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    result = run("eigs", "ggn", "--problem", tiny, "--plot", "a.png")
    assert result.exit_code == 2
    assert 'pip install "curvalg[plot]"' in result.stderr


@pytest.fixture
def figure_of(inside):
    """(expression, problem, k, which) -> the figure of its eigenpairs, as the command draws it."""

    def draw(expression: str, problem: Problem, *, k: int, which: str = "LA"):
        op = parse(expression).lower(problem)
        pairs = inside["solve_of_commands"](op, k, which=which, tol=0.0, seed=0)
        return draw_pairs(op, pairs, "tiny", which)

    return draw

"""How results, problems and operators show themselves: a line for print, a card for notebooks."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import curvalg
from curvalg import Identity, Problem, inverse, registry
from curvalg.estimate import (
    diagonal,
    eigsh,
    gradient_noise,
    influence,
    saliency,
    spectral_density,
    svds,
    trace,
)


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return Problem(net, nn.CrossEntropyLoss(), (torch.randn(30, 6).double(), torch.arange(30) % 3))


RESULTS = {
    "eigenpairs": lambda op: eigsh(op, 4),
    "many eigenpairs": lambda op: eigsh(op, 40),
    "density": lambda op: spectral_density(op, probes=3, steps=8),
    "density with outliers": lambda op: spectral_density(op, probes=3, steps=8, outliers=2),
    "trace": lambda op: trace(op, products=20),
    "exact trace": lambda op: trace(registry.build("ggn").lower(op.problem)),
    "diagonal": lambda op: diagonal(op, products=20),
    "singular values": lambda op: svds(op, 3),
    "noise": lambda op: gradient_noise(op.problem),
    "saliency": lambda op: saliency(op, "parameter"),
    "influence": lambda op: influence(
        inverse(registry.build("ggn") + Identity).lower(op.problem),
        op.problem.with_data((torch.ones(2, 6).double(), torch.zeros(2).long())),
    ),
    "influence by layer": lambda op: influence(inverse(registry.build("ggn") + Identity).lower(op.problem), by="layer"),
}


class Balanced(HTMLParser):
    """Fails where tags do not close."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def well_formed(html):
    parser = Balanced()
    parser.feed(html)
    return not parser.open


@pytest.mark.parametrize("name", RESULTS)
def test_results_print_as_one_line_and_show_as_cards(name, problem):
    result = RESULTS[name](registry.build("hessian").lower(problem))
    assert "\n" not in str(result) and len(str(result)) < 300 and repr(result) == str(result)
    assert f"{result.products} products" in str(result)
    html = result._repr_html_()
    assert well_formed(html) and type(result).__name__ in html


def test_a_line_has_the_numbers(problem):
    pairs = eigsh(registry.build("hessian").lower(problem), 3)
    for value in pairs.eigenvalues.tolist():
        assert f"{value:.5g}" in str(pairs) and f"{value:.6g}" in pairs._repr_html_()
    many = eigsh(registry.build("hessian").lower(problem), 40)
    assert "..." in str(many) and "and 10 smaller ones" in many._repr_html_()


def test_an_estimate_is_a_number(problem):
    op = registry.build("hessian").lower(problem)
    estimate, exact = trace(op, products=20), trace(registry.build("ggn").lower(problem))
    assert float(estimate) == estimate.value and float(exact) == exact.value
    assert f"{estimate:.3f}" == f"{estimate.value:.3f} ± {estimate.error:.3f}"
    assert f"{exact:.3f}" == f"{exact.value:.3f}" and f"{exact}" == str(exact)
    shown = re.search(r"value (\S+) ± (\S+);", str(estimate))
    assert float(shown[1]) == pytest.approx(estimate.value, abs=estimate.error / 10)
    assert float(shown[2]) == pytest.approx(estimate.error, rel=0.1)
    with pytest.raises(TypeError, match=r"take result\.value"):
        float(diagonal(op, products=20))
    with pytest.raises(TypeError, match=r"take result\.value"):
        f"{diagonal(op, products=20):.3f}"


def test_what_went_otherwise_is_said(problem, inside):
    inside(cheap_exact=0)
    with pytest.warns(curvalg.CurvalgWarning):
        result = eigsh(registry.build("hessian").lower(problem), 3, tol=1e-14, maxiter=12, block=3, on_fail="warn")
    assert "not converged" in str(result) and "not converged" in result._repr_html_()


def test_problems_and_operators_are_cards(problem):
    op = (registry.build("ggn") + 1e-3 * Identity).lower(problem)
    for thing, facts in (
        (problem, ("Sequential", "CrossEntropy", "83 in 4 tensors")),
        (op, ("83 x 83", "psd: yes", "ggn + 0.001*identity")),
    ):
        html = thing._repr_html_()
        assert well_formed(html)
        assert all(fact in html for fact in facts)
    assert "\\mathrm" in op._repr_html_() or "$" in op._repr_html_()


def test_names_are_listed_once():
    names = [name for name in dir(curvalg) if not name.startswith("_")]
    assert names == sorted(curvalg.__all__)


def test_an_editor_sees_what_users_call_of_a_problem(problem):
    listed = [name for name in dir(problem) if not name.startswith("_")]
    assert len(listed) == len(set(listed)) < 30
    assert {"value", "gradient", "layout", "per_sample_gradients", "with_data", "step", "refresh", "close"} <= set(
        listed
    )
    assert all(hasattr(problem, name) for name in listed)
    documented = [name for name in listed if callable(getattr(problem, name))]
    assert all(getattr(type(problem), name).__doc__ for name in documented if hasattr(type(problem), name))


def test_gradients_of_single_samples(problem):
    """Against autograd, one sample after the other; and with several batches and a sum."""
    X, y = torch.randn(7, 6, generator=torch.Generator().manual_seed(1)).double(), torch.arange(7) % 3
    net = problem.model.module
    for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")):
        rows = Problem(net, loss, [(X[:4], y[:4]), (X[4:], y[4:])]).per_sample_gradients()
        for row, x, label in zip(rows, X, y, strict=True):
            own = torch.autograd.grad(loss(net(x[None]), label[None]), list(net.parameters()))
            assert torch.allclose(row, torch.cat([g.reshape(-1) for g in own]), atol=1e-14)
    part = Problem(net, nn.CrossEntropyLoss(), (X, y), params="2.*")
    assert torch.allclose(part.per_sample_gradients().mean(0), part.gradient(), atol=1e-14)


def test_gradients_of_a_batch_are_flattened_by_sample(problem):
    """A leading sample axis, as per-sample gradients have it; a trailing one is of columns."""
    with problem.batches() as batches:
        shares = next(iter(batches)).per_sample_gradients()
    layout = problem.layout
    rows = layout.flatten(shares, leading=True)
    assert rows.shape == (30, problem.size)
    assert torch.allclose(30 * rows, problem.per_sample_gradients(), atol=1e-14)
    assert torch.equal(rows, torch.stack([layout.flatten({n: g[i] for n, g in shares.items()}) for i in range(30)]))
    with pytest.raises(curvalg.VectorError, match="pass leading=True"):
        layout.flatten(shares)
    with pytest.raises(curvalg.VectorError, match=r"leading sample axis, but 0\.weight"):
        layout.flatten({name: torch.zeros(shape) for name, shape in layout.shapes.items()}, leading=True)


def test_solves_and_layouts_are_shown_in_a_line_and_as_cards(problem):
    solved = inverse(registry.build("ggn") + 0.1 * Identity, solver="cg").lower(problem).solve(problem.gradient())
    assert repr(solved).startswith(f"SolveResult(x ({problem.size},); all 1 columns converged in at most ")
    shown = solved._repr_html_()
    assert "converged" in shown and "<table>" in shown and "data:image/png" in shown
    for name in problem.layout.names:
        assert name in problem.layout._repr_html_()

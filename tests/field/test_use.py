"""What people miss when they use such libraries; one test named after each complaint."""

from __future__ import annotations

import matplotlib as mpl
import pytest
import torch
from torch import nn

from curvalg import Problem, block_diagonal, registry, restrict
from curvalg.estimate import eigsh, spectral_density, trace

build = registry.build


@pytest.fixture
def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 30), nn.Tanh(), nn.Linear(30, 20)).double()
    return Problem(net, nn.CrossEntropyLoss(), (torch.randn(40, 10).double(), torch.arange(40) % 20))


def test_curvature_of_one_layer(problem):
    whole = build("hessian").lower(problem).to_dense()
    at = slice(problem.layout.slices["2.weight"].start, problem.size)
    found = eigsh(restrict(build("hessian"), "2.*").lower(problem), 3, which="LA", tol=1e-8)
    assert torch.allclose(found.eigenvalues, torch.linalg.eigvalsh(whole[at, at])[-3:], atol=1e-7)
    assert found.unflatten(2).keys() == {"2.weight", "2.bias"}
    layers = trace(block_diagonal(build("hessian"), by="module").lower(problem), products=problem.size)
    assert layers.value == pytest.approx(float(whole.trace()))


def test_eigenvectors_in_the_layout_of_the_model(problem):
    pairs = eigsh(build("ggn").lower(problem), 2, which="LA")
    by_name = pairs.unflatten(1)
    assert {name: t.shape for name, t in by_name.items()} == dict(problem.layout.shapes)
    product = build("ggn").lower(problem) @ by_name
    for name, t in product.items():
        assert torch.allclose(t, pairs.eigenvalues[1] * by_name[name], atol=1e-3)


def test_progress_of_long_runs(problem, capsys):
    eigsh(build("hessian").lower(problem), 3, which="LA", progress=True)
    shown = capsys.readouterr().err
    assert "eigsh" in shown and "product" in shown and "/" in shown  # products done / expected


def test_an_interruption_loses_nothing(problem, tmp_path, products):
    op, path = build("hessian").lower(problem), tmp_path / "run.safetensors"
    products.interrupt(40)
    partial = spectral_density(op, probes=2, steps=60, checkpoint=path)
    assert partial.partial and partial.products > 0
    products.columns = 0
    whole = spectral_density(op, probes=2, steps=60, checkpoint=path)
    assert not whole.partial and products.columns == whole.products - partial.products


def test_results_have_pictures(problem):
    mpl.use("Agg")
    op = build("hessian").lower(problem)
    for result in (eigsh(op, 4, which="LA"), spectral_density(op, probes=2, steps=20)):
        axes = result.plot()
        assert axes.get_xlabel() and axes.get_ylabel() and axes.lines


def test_what_a_product_costs_is_told(problem):
    op = (build("hessian") + build("ggn")).lower(problem)
    assert "one backward for all terms" in op.explain()
    assert "block_diagonal" not in op.explain()
    blocks = block_diagonal(build("hessian")).lower(problem).explain()
    assert "about 4 passes a product" in blocks
    found = trace(build("hessian").lower(problem), products=20)
    assert found.products == 20 and found.seconds > 0

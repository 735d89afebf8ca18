"""Spectral densities: moments, counts, edges, outliers, exactness, resumption and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator

from curvalg import CheckpointError, ExpressionError, FactsError, Identity, Problem, ProblemError, registry
from curvalg.estimate import spectral_density
from tests.support.spectra import F64, SPECTRA, matrix

SEEDS = range(20)


def integral(density) -> float:
    axis = density.grid.log10() if density.scale == "log" else density.grid
    return float(torch.trapezoid(density.density, axis))


def within(values, truth: float, slack: float = 1e-9) -> bool:
    """Whether the mean is within four standard errors of the truth."""
    values = torch.tensor(values, dtype=F64)
    return abs(float(values.mean()) - truth) <= 4 * float(values.std()) / len(values) ** 0.5 + slack


@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_integral_is_one_and_the_band_holds_the_curve(name, scale):
    density = spectral_density(matrix(SPECTRA[name]), probes=4, steps=20, scale=scale)
    assert abs(integral(density) - 1) < 1e-3
    assert bool((density.lower <= density.density).all() and (density.density <= density.upper).all())
    torch.testing.assert_close(density.weights.sum(1), torch.ones(4, dtype=F64))
    if scale == "log":
        assert bool((density.negative <= density.density + 1e-12).all())


@pytest.mark.parametrize("width", [1e-4, 1.0])
def test_the_grid_follows_a_width_that_is_given(width):
    density = spectral_density(matrix(SPECTRA["indefinite"]), probes=2, steps=20, width=width, grid=100)
    assert abs(integral(density) - 1) < 1e-3 and density.width == width


@pytest.mark.parametrize("name", SPECTRA)
def test_moments_are_those_of_the_matrix(name):
    A, spectrum = matrix(SPECTRA[name]), SPECTRA[name]
    densities = [spectral_density(A, probes=3, steps=20, seed=seed) for seed in SEEDS]
    for power in (1, 2, 3):
        moments = [float((d.weights * d.nodes**power).sum(1).mean()) for d in densities]
        assert within(moments, float((spectrum**power).mean())), power


@pytest.mark.parametrize(
    ("name", "a", "b"), [("low rank", 1, 4), ("low rank", -0.5, 0.5), ("two distinct", 0, 2), ("repeated", 4.5, 5.5)]
)
def test_counts_are_unbiased_and_their_errors_cover(name, a, b):
    spectrum, A = SPECTRA[name], matrix(SPECTRA[name])
    truth = int(((spectrum >= a) & (spectrum <= b)).sum())
    counts = [spectral_density(A, probes=20, steps=40, seed=seed).count(a, b) for seed in range(80)]
    assert within([c.value for c in counts], truth)
    assert sum(abs(c.value - truth) <= 2 * c.error + 1e-9 for c in counts) >= 0.85 * len(counts)
    cdf = spectral_density(A, probes=20, steps=40).cdf
    assert math.isclose(cdf(b) - cdf(a), counts[0].value / len(A), abs_tol=1e-9)
    assert cdf(-100.0) == 0 and math.isclose(cdf(100.0), 1)
    assert cdf(torch.tensor([a, b])).shape == (2,)


def test_the_errors_of_the_curve_cover():
    spectrum = SPECTRA["indefinite"]
    A, grid = matrix(spectrum), torch.linspace(-0.8, 0.8, 9, dtype=F64)
    truth = torch.exp(-(((grid[:, None] - spectrum) / 0.2) ** 2) / 2).mean(1) / (0.2 * math.sqrt(2 * math.pi))
    hits = []
    for seed in SEEDS:
        d = spectral_density(A, probes=10, steps=40, grid=grid, width=0.2, seed=seed)
        hits += ((d.density - truth).abs() <= 2 * (d.upper - d.density) + 1e-9).tolist()
    assert sum(hits) >= 0.85 * len(hits)


def test_edges_of_marchenko_and_pastur():
    n, N = 400, 1600
    X = torch.randn(N, n, generator=torch.Generator().manual_seed(0), dtype=F64)
    density = spectral_density(X.T @ X / N, probes=10, steps=60, width=0.05)
    low, high = (1 - 0.5) ** 2, (1 + 0.5) ** 2
    assert density.cdf(low - 0.05) < 2e-3 and density.cdf(high + 0.1) > 1 - 2e-3
    inside = (density.grid > low + 0.2) & (density.grid < high - 0.1)
    x = density.grid[inside]
    truth = ((high - x) * (x - low)).sqrt() / (2 * math.pi * 0.25 * x)
    assert float((density.density[inside] - truth).abs().max()) < 0.12
    mass = torch.trapezoid(density.density[inside], x) - torch.trapezoid(truth, x)
    assert abs(float(mass)) < 0.02


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_outliers_stand_at_their_place_with_their_weight(scale):
    spectrum = torch.cat([torch.linspace(-1, 1, 197, dtype=F64), torch.tensor([-30.0, 40.0, 50.0], dtype=F64)])
    density = spectral_density(matrix(spectrum), probes=4, steps=30, outliers=3, scale=scale, seed=1)
    torch.testing.assert_close(density.outliers, torch.tensor([-30.0, 40.0, 50.0], dtype=F64), rtol=1e-6, atol=0)
    assert abs(integral(density) - 1) < 1e-3
    assert float(density.nodes.abs().max()) < 1.01  # nothing of them is left in the bulk
    torch.testing.assert_close(density.weights.sum(1), torch.full((4,), 197 / 200, dtype=F64))
    axis, at = (density.grid.log10(), math.log10(50)) if scale == "log" else (density.grid, 50)
    near = (axis - at).abs() < 6 * density.width if scale == "linear" else axis > math.log10(45)
    if scale == "linear":
        mass = float(torch.trapezoid(density.density[near], axis[near]))
        assert abs(mass - 1 / 200) < 1e-5
        assert abs(float(axis[near][density.density[near].argmax()]) - 50) < density.width / 2
    one = density.count(45, 100)
    assert one.value == 1 and one.error == 0
    assert math.isclose(density.cdf(-20.0), 1 / 200)


def test_probes_of_the_complement_are_unbiased():
    spectrum = SPECTRA["repeated"]
    A = matrix(spectrum)
    densities = [spectral_density(A, probes=3, steps=20, outliers=2, seed=seed) for seed in SEEDS]
    totals = [float((d.weights * d.nodes).sum(1).mean() + d.outliers.sum() / len(A)) for d in densities]
    assert within(totals, float(spectrum.mean()))


def test_outliers_that_are_much_of_a_small_matrix():
    spectrum = torch.tensor([10.0, 8.0, -7.0, 1.0, 0.5, -0.2], dtype=F64)
    densities = [spectral_density(matrix(spectrum), probes=4, outliers=3, seed=seed) for seed in range(60)]
    for power in (1, 2):
        moments = [float((d.weights * d.nodes**power).sum(1).mean()) * 6 for d in densities]
        assert within(moments, float((spectrum[3:] ** power).sum()), slack=1e-4), power


def test_signs_are_kept_apart_on_a_log_scale():
    spectrum = torch.cat([torch.full((30,), -1.0, dtype=F64), torch.full((70,), 100.0, dtype=F64)])
    density = spectral_density(matrix(spectrum), scale="log", probes=20)
    share = float(torch.trapezoid(density.negative, density.grid.log10()))
    assert abs(share - 0.3) < 0.08
    low = density.grid < 10
    torch.testing.assert_close(density.negative[low], density.density[low])
    assert math.isclose(density.floor, 1e-5 * 100)


def ggn(rows: int = 20, **options):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(10, 40), torch.nn.Tanh(), torch.nn.Linear(40, 3))
    data = (torch.randn(rows, 10), torch.randint(0, 3, (rows,)))
    return Problem(net, torch.nn.CrossEntropyLoss(), data, **options)


def test_structure_gives_the_exact_density():
    op = (registry.build("ggn") + 0.5 * Identity).lower(ggn())
    exact = spectral_density(op, width=0.02)
    assert exact.method == "exact" and abs(integral(exact) - 1) < 1e-3
    assert torch.equal(exact.lower, exact.density) and torch.equal(exact.upper, exact.density)
    truth = torch.linalg.eigvalsh(op.to_dense().double())
    assert (
        exact.count(0.51, 100).value == int(((truth >= 0.51) & (truth <= 100)).sum()) and exact.count(0, 1).error == 0
    )
    curve = torch.exp(-(((exact.grid[:, None] - truth) / 0.02) ** 2) / 2).mean(1) / (0.02 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(exact.density, curve, atol=1e-2, rtol=1e-2)
    peaks = spectral_density(op, outliers=4)
    torch.testing.assert_close(peaks.outliers, truth[-4:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(float(peaks.weights.sum()), 1 - 4 / len(truth))
    assert abs(integral(peaks) - 1) < 1e-3


def test_a_model_without_structure(inside):
    problem = ggn()
    op = registry.build("hessian").lower(problem)
    truth = torch.linalg.eigvalsh(op.to_dense().double())
    inside(cheap_density=0)
    density = spectral_density(op, probes=8, steps=30, seed=3)
    assert density.method == "slq" and density.products == 240
    traces = (density.weights * density.nodes).sum(1)
    assert abs(float(traces.mean() - truth.mean())) <= 4 * float(traces.std()) / 8**0.5


def test_a_recurrence_without_its_basis(monkeypatch, inside):
    A = matrix(SPECTRA["low rank"], torch.float32)
    whole = spectral_density(A, probes=5, steps=40)
    inside(kept_rules=0)
    bare = spectral_density(A, probes=5, steps=40)
    assert "three-term" in bare.method and whole.method == "slq"
    for a, b in ((1.5, 4), (-0.5, 0.5), (-2, -0.5)):
        assert abs(bare.count(a, b).value - whole.count(a, b).value) < 1e-2
    B = matrix(SPECTRA["indefinite"])
    bare = spectral_density(B, probes=5, steps=90, width=0.1)
    monkeypatch.undo()
    whole = spectral_density(B, probes=5, steps=90, width=0.1, grid=bare.grid)
    assert float((bare.density - whole.density).abs().max()) < 1e-2 * float(whole.density.max())


def test_the_basis_stays_orthonormal():
    from curvalg.solve import quadrature

    A = matrix(torch.logspace(3, -6, 150, dtype=F64))
    rows = torch.nn.functional.normalize(torch.randn(4, 150, generator=torch.Generator().manual_seed(0), dtype=F64))
    r = quadrature.begin(rows, whole=True, capacity=100)
    for _ in range(100):
        r = quadrature.advance(r, lambda x: A @ x)
    V = r.vectors()
    assert float((V @ V.transpose(1, 2) - torch.eye(100, dtype=F64)).abs().max()) < 1e-12
    for p in range(4):
        T = torch.diag(r.alphas[:, p]) + torch.diag(r.betas[:-1, p], 1) + torch.diag(r.betas[:-1, p], -1)
        torch.testing.assert_close(V[p] @ A @ V[p].T, T, atol=1e-9, rtol=0)


def test_probes_that_end_early_cost_nothing_more():
    assert spectral_density(matrix(SPECTRA["identity"]), probes=4).products == 4 + 2  # two tried the symmetry
    assert spectral_density(matrix(SPECTRA["two distinct"]), probes=4).products == 8 + 2
    d = spectral_density(torch.zeros(30, 30), probes=3)
    assert d.cdf(0.0) == 1 and d.cdf(-1e-3) == 0
    calls = []

    def product(x):
        calls.append(x.shape[1])
        return matrix(SPECTRA["decaying"]).numpy() @ x

    op = LinearOperator((120, 120), matvec=product, matmat=product, dtype=float)
    assert spectral_density(op, probes=7, steps=5).products == 37 and calls == [2] + [7] * 5


def test_the_same_seed_gives_the_same_and_another_one_another():
    A = matrix(SPECTRA["decaying"])
    first, again, other = (spectral_density(A, steps=10, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.density, again.density) and not torch.equal(first.nodes, other.nodes)
    assert not torch.equal(first.nodes[0], first.nodes[1])


class Interrupted:
    """A product that is interrupted once."""

    def __init__(self, at: int) -> None:
        self.at, self.products, self.A = at, 0, matrix(SPECTRA["clustered"]).numpy()

    def __call__(self, x):
        self.products += 1
        if self.products == self.at:
            raise KeyboardInterrupt
        return self.A @ x

    @property
    def op(self):
        return LinearOperator(self.A.shape, matvec=self, matmat=self, dtype=float)


@pytest.mark.parametrize("kept", [None, 0])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, inside, kept):
    if kept is not None:
        inside(kept_rules=kept)
    inside(widest_rules=4)
    path = tmp_path / "run.safetensors"
    options = {"probes": 6, "steps": 12, "checkpoint": path}
    whole = spectral_density(Interrupted(0).op, probes=6, steps=12)
    for at in (5, 8, 9):  # within the first round of four, and in the second of two
        part = spectral_density(Interrupted(at).op, **options)
        assert part.partial and not part.converged and abs(integral(part) - 1) < 1e-3
    done = spectral_density(Interrupted(0).op, **options)
    assert torch.equal(done.nodes, whole.nodes) and torch.equal(done.density, whole.density)
    assert done.products == whole.products and done.converged
    with pytest.raises(CheckpointError, match="option probes differs"):
        spectral_density(Interrupted(0).op, probes=7, steps=12, checkpoint=path)
    for name, value in (("steps", 11), ("seed", 1)):
        with pytest.raises(CheckpointError, match=f"option {name} differs"):
            spectral_density(Interrupted(0).op, **{**options, name: value})
    with pytest.raises(KeyboardInterrupt):
        spectral_density(Interrupted(2).op, probes=6, steps=12)


def test_outliers_have_a_checkpoint_of_their_own(tmp_path):
    path = tmp_path / "run.safetensors"
    options = {"outliers": 2, "probes": 3, "steps": 10}
    whole = spectral_density(Interrupted(0).op, **options)
    with pytest.raises(KeyboardInterrupt):
        spectral_density(Interrupted(15).op, checkpoint=path, **options)
    done = spectral_density(Interrupted(0).op, checkpoint=path, **options)
    assert (tmp_path / "run.safetensors.outliers").exists() and path.exists()
    torch.testing.assert_close(done.outliers, whole.outliers, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_plots(scale):
    pytest.importorskip("matplotlib").use("Agg")
    spectrum = torch.cat([torch.linspace(-1, 1, 98, dtype=F64), torch.tensor([-30.0, 40.0], dtype=F64)])
    ax = spectral_density(matrix(spectrum), outliers=2, scale=scale, probes=3).plot()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert {"density", "± standard error", "outliers"} <= set(labels) and ("of λ < 0" in labels) == (scale == "log")
    assert ax.get_yscale() == "log" and ax.get_xscale() == scale
    assert len(ax.lines[-1].get_xdata()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 0}, "expected probes to be an integer ≥ 1, got 0"),
        ({"steps": 0}, "expected steps to be an integer ≥ 1, got 0"),
        ({"steps": 2.5}, "expected steps"),
        ({"probes": True}, "expected probes"),
        ({"scale": "loglog"}, "expected scale to be one of 'linear', 'log', got 'loglog'"),
        ({"scale": ["log"]}, "expected scale"),
        ({"outliers": -1}, "expected 0 ≤ outliers < 120 for 120 rows, got -1"),
        ({"outliers": 120}, "expected 0 ≤ outliers < 120"),
        ({"outliers": 1.0}, "expected outliers to be a number of eigenvalues"),
        ({"grid": 0}, "expected grid"),
        ({"grid": torch.tensor([1.0, 0.0])}, "expected ascending points"),
        ({"grid": torch.tensor([-1.0, 0.0]), "scale": "log"}, "expected positive points on a log scale"),
        ({"width": 0.0}, "expected a width > 0, or None, got 0.0"),
        ({"width": float("nan")}, "expected a width"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ExpressionError, match=message):
        spectral_density(matrix(SPECTRA["decaying"]), **options)


def test_operators_that_do_not_fit():
    with pytest.raises(FactsError, match="expected a symmetric operator"):
        spectral_density(torch.triu(matrix(SPECTRA["decaying"])))
    with pytest.raises(FactsError, match="expected a square operator"):
        spectral_density(registry.build("jacobian").lower(ggn()))

    def product(x, count=[0]):  # noqa: B006
        count[0] += 1
        return x if count[0] < 3 else np.full_like(x, np.nan)

    with pytest.raises(ProblemError, match="expected finite products"):
        spectral_density(LinearOperator((9, 9), matvec=product, matmat=lambda x: product(x + x[::-1]), dtype=float))


def test_a_single_probe_has_no_error():
    d = spectral_density(matrix(SPECTRA["decaying"]), probes=1)
    assert bool(d.upper.isnan().all()) and math.isnan(d.count(0, 1).error) and abs(integral(d) - 1) < 1e-3

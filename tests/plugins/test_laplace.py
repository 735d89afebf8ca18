"""Laplace approximations, against dense matrices and normal distributions in plain torch."""

from __future__ import annotations

import copy
import math

import matplotlib
import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev, vmap

from curvalg import (
    ExpressionError,
    FactsError,
    LossError,
    OptionError,
    Problem,
    ProblemError,
    StaleError,
    block_diagonal,
    registry,
)
from curvalg.losses import CrossEntropy
from curvalg_plugins.laplace import laplace
from curvalg_plugins.laplace.posterior import Posterior

matplotlib.use("Agg")
D = torch.float64
BY = ("all", "module", "parameter")
MATRICES = {
    "kfac": "kfac",
    "kfac apart": "kfac(joint=False)",
    "ekfac": "ekfac",
    "diagonal": "ggn_diagonal",
    "modules": block_diagonal(registry.build("ggn"), by="module"),
    "dense": "ggn",
}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(D)


X, LABELS, TARGETS, ASKED = random(20, 4), torch.arange(20) % 3, random(20, 3, seed=1), random(6, 4, seed=2)


def classification(reduction="mean", matrix="kfac", **options):
    batches = [(X[:12], LABELS[:12]), (X[12:], LABELS[12:])]
    return laplace(Problem(network(), nn.CrossEntropyLoss(reduction=reduction), batches), matrix, **options)


def regression(reduction="mean", matrix="kfac", **options):
    return laplace(Problem(network(), nn.MSELoss(reduction=reduction), (X, TARGETS)), matrix, **options)


def jacobians(net, inputs):
    """Jacobians of the outputs of all rows (n, C, D), by torch.func alone."""
    params = {name: p.detach() for name, p in net.named_parameters()}
    found = vmap(jacrev(lambda ps, x: functional_call(net, ps, (x[None],))[0]), (None, 0))(params, inputs)
    return torch.cat([g.flatten(2) for g in found.values()], 2)


def weights(net):
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_precision_is_the_curvature_of_the_whole_data_and_the_prior(reduction):
    net = network()
    J, z = jacobians(net, X), net(X).detach()
    for posterior, B in (
        (
            classification(reduction, "ggn", prior=0.7),
            lambda z: torch.diag(z.softmax(0)) - torch.outer(z.softmax(0), z.softmax(0)),
        ),
        (regression(reduction, "ggn", prior=0.7, sigma=0.5), lambda z: torch.eye(3, dtype=D) / 0.5**2),
    ):
        expected = torch.einsum("nci,ncd,ndj->ij", J, torch.stack([B(row) for row in z]), J)
        expected.diagonal().add_(0.7)
        torch.testing.assert_close(posterior.precision.lower(posterior.problem).to_dense(), expected)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("make", [classification, regression])
@pytest.mark.parametrize("prior", [0.7, {"*": 0.7, "0.*": 0.2}, {"*.weight": 0.7, "*.bias": 0.2}])
def test_the_evidence_is_that_of_the_dense_precision(name, make, prior):
    posterior = make(matrix=MATRICES[name], prior=prior, **({"sigma": 0.6} if make is regression else {}))
    layout = posterior.problem.layout
    delta = torch.cat([torch.full((layout.shapes[n].numel(),), posterior.prior[n], dtype=D) for n in layout.names])
    P = posterior.precision.lower(posterior.problem).to_dense()
    w, z = weights(network()), network()(X).detach()
    if make is classification:
        fit = -nn.functional.cross_entropy(z, LABELS, reduction="sum")
    else:
        fit = torch.distributions.Normal(z, 0.6).log_prob(TARGETS).sum()
    expected = fit - (torch.logdet(P) - delta.log().sum() + (delta * w.square()).sum()) / 2
    assert posterior.log_evidence() == pytest.approx(float(expected), abs=1e-8)
    J = jacobians(network(), ASKED)
    torch.testing.assert_close(posterior.functional_variance(ASKED), J @ torch.linalg.inv(P) @ J.mT)


def test_the_evidence_of_a_linear_model_is_the_probability_of_the_data():
    torch.manual_seed(0)
    net = nn.Linear(4, 1, bias=False).to(D)
    y, prior, sigma = random(20, 1, seed=3), 0.4, 0.7
    best = torch.linalg.solve(X.T @ X / sigma**2 + prior * torch.eye(4, dtype=D), X.T @ y / sigma**2)
    with torch.no_grad():
        net.weight.copy_(best.T)
    covariance = sigma**2 * torch.eye(20, dtype=D) + X @ X.T / prior
    expected = torch.distributions.MultivariateNormal(torch.zeros(20, dtype=D), covariance).log_prob(y[:, 0])
    for matrix in ("ggn", "hessian", "kfac"):
        posterior = laplace(Problem(net, nn.MSELoss(), (X, y)), matrix, prior=prior, sigma=sigma)
        assert posterior.log_evidence() == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("name", MATRICES)
def test_tuned_precisions_have_the_largest_evidence(name, by):
    tuned = classification(matrix=MATRICES[name]).tune_prior(by)
    top = tuned.log_evidence()
    owners = {"all": lambda n: "", "module": lambda n: n.split(".")[0], "parameter": lambda n: n}[by]
    assert len(set(tuned.prior.values())) == len({owners(n) for n in tuned.prior})
    for owner in {owners(n) for n in tuned.prior}:
        for factor in (0.99, 1.01):
            moved = {n: v * factor if owners(n) == owner else v for n, v in tuned.prior.items()}
            lower = laplace(tuned.problem, MATRICES[name], prior=moved).log_evidence()
            assert lower < top
            assert top - lower < 1e-3


def test_large_blocks_over_several_groups_are_refused_with_what_works():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 420), nn.Tanh(), nn.Linear(420, 3)).to(D)
    problem = Problem(net, nn.CrossEntropyLoss(), (random(20, 9), LABELS))
    with pytest.raises(ExpressionError, match=r"kfac, or smaller blocks, as ekfac\(joint=False\)"):
        laplace(problem, "ekfac").tune_prior("parameter")
    for matrix in ("kfac", "ekfac(joint=False)"):
        tuned = laplace(problem, matrix).tune_prior("parameter")
        top = tuned.log_evidence()
        for name in ("0.weight", "0.bias"):
            for factor in (0.99, 1.01):
                moved = {n: v * factor if n == name else v for n, v in tuned.prior.items()}
                assert top - 1e-2 < laplace(problem, matrix, prior=moved).log_evidence() < top


@pytest.mark.parametrize("by", ["all", "module"])
def test_noise_and_precisions_are_tuned_together(by):
    tuned = regression().tune_prior(by, noise=True)
    top = tuned.log_evidence()
    for factor in (0.999, 1.001):
        assert regression(prior=tuned.prior, sigma=tuned.sigma * factor).log_evidence() < top
        moved = {n: v * factor for n, v in tuned.prior.items()}
        assert regression(prior=moved, sigma=tuned.sigma).log_evidence() < top


@pytest.mark.parametrize("name", MATRICES)
def test_draws_have_the_covariance_of_the_posterior(name):
    posterior = classification(matrix=MATRICES[name], prior={"*.weight": 0.7, "*.bias": 2.0})
    count = 40_000
    draws = posterior.sample(count, seed=3)
    covariance = torch.linalg.inv(posterior.precision.lower(posterior.problem).to_dense())
    scale = covariance.diagonal().sqrt()
    assert bool(((draws.mean(0) - weights(network())).abs() < 5 * scale / math.sqrt(count)).all())
    error = (draws.T.cov() - covariance).abs() / torch.outer(scale, scale)
    assert float(error.max()) < 6 * math.sqrt(2 / count)
    assert torch.equal(draws[:5], posterior.sample(count, seed=3)[:5])
    assert not torch.equal(draws[:5], posterior.sample(count, seed=4)[:5])


def test_draws_through_the_kernel_of_groups_and_of_exact_blocks():
    torch.manual_seed(0)
    grouped = nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(4, 3))
    normed = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    few = (X[:2], LABELS[:2])
    for net, data, matrix in (
        (grouped, (X, LABELS), "kfac"),
        (normed, (X, LABELS), "kfac"),
        (network(), few, "ggn"),
        (network(), few, "covariance"),
    ):
        posterior = laplace(Problem(net.to(D), nn.CrossEntropyLoss(), data), matrix, prior=0.5)
        count = 20_000
        draws, P = posterior.sample(count), posterior.precision.lower(posterior.problem).to_dense()
        whitened = (draws - posterior.mean) @ torch.linalg.cholesky(P)
        error = (whitened.T.cov() - torch.eye(len(P), dtype=D)).abs()
        assert float(error.max()) < 6 * math.sqrt(2 / count)


def test_links():
    posterior = classification()
    z, V = network()(ASKED).detach(), posterior.functional_variance(ASKED)
    v = V.diagonal(dim1=1, dim2=2)
    found = posterior.predict(ASKED)
    torch.testing.assert_close(found.mean, (z / (1 + math.pi / 8 * v).sqrt()).softmax(1))
    torch.testing.assert_close(found.output_variance, v)
    torch.testing.assert_close(posterior.predict(ASKED, link="mean").mean, z.softmax(1))
    drawn = torch.distributions.MultivariateNormal(z, V).sample((40_000,)).softmax(2).mean(0)
    found = posterior.predict(ASKED, link="mc", samples=40_000).mean
    assert float((found - drawn).abs().max()) < 0.01
    assert float((found - z.softmax(1)).abs().max()) > 0.02


def test_regression_adds_the_noise():
    posterior = regression(sigma=0.6)
    found = posterior.predict(ASKED)
    torch.testing.assert_close(found.mean, network()(ASKED).detach())
    v = posterior.functional_variance(ASKED, diagonal=True)
    torch.testing.assert_close(found.variance, v + 0.36)
    torch.testing.assert_close(found.deviation, (v + 0.36).sqrt())


def test_binary_outputs():
    targets = (TARGETS > 0).to(D)
    posterior = laplace(Problem(network(), nn.BCEWithLogitsLoss(), (X, targets)), "ggn")
    z, v = network()(ASKED).detach(), posterior.functional_variance(ASKED, diagonal=True)
    torch.testing.assert_close(posterior.predict(ASKED).mean, (z / (1 + math.pi / 8 * v).sqrt()).sigmoid())
    drawn = torch.distributions.Normal(z, v.sqrt()).sample((40_000,)).sigmoid().mean(0)
    assert float((posterior.predict(ASKED, link="mc", samples=40_000).mean - drawn).abs().max()) < 0.01
    P = posterior.precision.lower(posterior.problem).to_dense()
    loss = nn.functional.binary_cross_entropy_with_logits(network()(X).detach(), targets, reduction="sum")
    w = weights(network())
    assert posterior.log_evidence() == pytest.approx(float(-loss - (torch.logdet(P) + w @ w) / 2))


@pytest.mark.parametrize("axis", [1, -1])
def test_classes_of_positions_lie_along_their_axis(axis):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (3, 2) if axis == 1 else (2, 3))).to(D)
    labels = torch.arange(40).reshape(20, 2) % 3
    posterior = laplace(Problem(net, CrossEntropy(class_axis=axis), (X, labels)), "ggn")
    z = net(ASKED).detach()
    for link in ("probit", "mc", "mean"):
        found = posterior.predict(ASKED, link=link)
        assert found.mean.shape == z.shape
        torch.testing.assert_close(found.mean.sum(axis), torch.ones(6, 2, dtype=D))
    # Forty positions count, not twenty rows.
    flat = posterior.precision.lower(posterior.problem).to_dense() - torch.eye(posterior.problem.size, dtype=D)
    summed = registry.build("ggn").lower(Problem(net, CrossEntropy(class_axis=axis, reduction="sum"), (X, labels)))
    torch.testing.assert_close(flat, summed.to_dense())


def test_some_parameters_and_their_kernel():
    net = network()
    last = Problem(net, nn.CrossEntropyLoss(), (X, LABELS), params="2.*")
    every = jacobians(net, ASKED)
    wide = Problem(net, nn.CrossEntropyLoss(), (X[:3], LABELS[:3]))
    for problem, J, matrix in ((last, every[:, :, 25:], "kfac"), (last, every[:, :, 25:], "ggn"), (wide, every, "ggn")):
        posterior = laplace(problem, matrix, prior=0.3)
        P = posterior.precision.lower(problem).to_dense()
        torch.testing.assert_close(posterior.functional_variance(ASKED), J @ torch.linalg.inv(P) @ J.mT)
        asked = Problem(net, None, ASKED, params=list(problem.layout.names))
        torch.testing.assert_close(posterior.functional_variance(asked), J @ torch.linalg.inv(P) @ J.mT)
        assert posterior.predict(ASKED).mean.shape == (6, 3)
        assert posterior.sample(2).shape == (2, problem.size)


def test_many_parameters_and_few_outputs_go_through_the_kernel():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 700), nn.Tanh(), nn.Linear(700, 1)).to(D)
    posterior = laplace(Problem(net, nn.MSELoss(), (X, TARGETS[:, :1])), "ggn", sigma=0.5)
    assert posterior.problem.size > 4096
    J, asked = (jacobians(net, x)[:, 0] for x in (X, ASKED))
    K = J @ J.T + 0.25 * torch.eye(20, dtype=D)
    expected = (asked * asked).sum(1) - ((asked @ J.T) * torch.linalg.solve(K, J @ asked.T).T).sum(1)
    torch.testing.assert_close(posterior.functional_variance(ASKED)[:, 0, 0], expected)
    occam = torch.logdet(torch.eye(20, dtype=D) + J @ J.T / 0.25)
    fit = torch.distributions.Normal(net(X).detach(), 0.5).log_prob(TARGETS[:, :1]).sum()
    w = weights(net)
    assert posterior.log_evidence() == pytest.approx(float(fit - (occam + w @ w) / 2))
    tuned = posterior.tune_prior()
    assert tuned.log_evidence() > posterior.log_evidence()
    assert posterior.sample(2).shape == (2, posterior.problem.size)


def test_validation_chooses_out_of_the_grid():
    data = (ASKED, torch.arange(6) % 3)
    grid = (0.01, 1.0, 100.0)
    chosen = classification().tune_prior(validation=data, grid=grid)
    held = Problem(network(), nn.CrossEntropyLoss(), data)
    scores = {p: classification(prior=p).log_probability(held) for p in grid}
    assert set(chosen.prior.values()) == {max(scores, key=scores.get)}
    p = classification(prior=1.0).predict(ASKED).mean
    assert scores[1.0] == pytest.approx(float(p[torch.arange(6), data[1]].log().sum()))
    posterior = regression(sigma=0.5)
    found = posterior.predict(ASKED)
    expected = torch.distributions.Normal(found.mean, found.deviation).log_prob(TARGETS[:6]).sum()
    scored = posterior.log_probability(Problem(network(), nn.MSELoss(), (ASKED, TARGETS[:6])))
    assert scored == pytest.approx(float(expected))


def test_a_matrix_of_the_users_own():
    ggn, kfac = registry.build("ggn"), registry.build("kfac")
    mixed, P = classification(matrix=(ggn + kfac) / 2), []
    for matrix in (mixed.curvature, ggn, kfac):
        P.append(classification(matrix=matrix).precision.lower(mixed.problem).to_dense())
    torch.testing.assert_close(P[0], (P[1] + P[2]) / 2)
    assert math.isfinite(mixed.log_evidence())


def test_a_hessian_that_is_not_positive_definite_is_no_posterior():
    net = network()
    w = {n: p.detach() for n, p in net.named_parameters()}
    full = hessian(lambda ps: nn.functional.mse_loss(functional_call(net, ps, (X,)), TARGETS))(w)
    assert full
    with pytest.raises(FactsError, match="not positive definite"):
        regression(matrix="hessian", prior=1e-6).log_evidence()


def test_the_last_pattern_that_fits_counts():
    prior = classification(prior={"*": 0.7, "0.*": 0.2, "0.bias": 3.0}).prior
    assert prior == {"0.weight": 0.2, "0.bias": 3.0, "2.weight": 0.7, "2.bias": 0.7}


def test_refusals():
    with pytest.raises(LossError, match="negative logarithm of a probability"):
        laplace(Problem(network(), nn.SmoothL1Loss(), (X, TARGETS)))
    for options, words in (
        ({"prior": 0.0}, "a precision is a positive number"),
        ({"prior": {"5.*": 1.0}}, "no parameter fits"),
        ({"prior": {"0.*": 1.0}}, r"got none for 2\.weight"),
        ({"sigma": 2.0}, "noise of regression"),
    ):
        with pytest.raises(OptionError, match=words):
            classification(**options)
    with pytest.raises(ExpressionError, match="symmetric"):
        classification(matrix="jacobian")
    with pytest.raises(OptionError, match="expected a Problem"):
        laplace(network())
    posterior = classification()
    for call, words in (
        (lambda: posterior.tune_prior("layer"), "by is"),
        (lambda: posterior.tune_prior(noise=True), "regression"),
        (lambda: posterior.tune_prior("module", validation=(X, LABELS)), "leave by= and noise= out"),
        (lambda: posterior.predict(ASKED, link="logit"), "link is one of"),
        (lambda: posterior.sample(0), "n is a positive integer"),
        (lambda: regression(matrix="ggn").tune_prior("module", noise=True), "noise=True needs eigenvalues"),
    ):
        with pytest.raises(OptionError, match=words):
            call()


ASKS = {
    "precision": lambda posterior: posterior.precision,
    "covariance": lambda posterior: posterior.covariance,
    "sample": lambda posterior: posterior.sample(2),
    "log_evidence": lambda posterior: posterior.log_evidence(),
    "tune_prior": lambda posterior: posterior.tune_prior(),
    "tune_prior, validation": lambda posterior: posterior.tune_prior(validation=(X, LABELS), grid=[1.0]),
    "functional_variance": lambda posterior: posterior.functional_variance(ASKED),
    "functional_variance, problem": lambda posterior: posterior.functional_variance(posterior.problem),
    "predict": lambda posterior: posterior.predict(ASKED),
    "log_probability": lambda posterior: posterior.log_probability(posterior.problem),
    "plot": lambda posterior: posterior.plot(factors=[1.0]),
}
"""All that is asked of a posterior."""


def test_all_that_is_asked_of_a_posterior_is_in_the_table():
    public = {
        name for name in vars(Posterior) if not name.startswith("_") and name not in Posterior.__dataclass_fields__
    }
    assert public == {name.split(",")[0] for name in ASKS}


@pytest.mark.parametrize("matrix", ["kfac", "ggn"])
@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("ask", ASKS)
def test_moved_parameters_are_noticed(ask, asked_before, matrix):
    net = network()
    net.append(nn.BatchNorm1d(3, affine=False, dtype=torch.float64).eval())
    posterior = laplace(Problem(net, nn.CrossEntropyLoss(), (X, LABELS)), matrix)
    if asked_before:
        ASKS[ask](posterior)
    before = copy.deepcopy(net.state_dict())
    for moved in (net[0].bias, net[-1].running_mean):
        with torch.no_grad():
            moved.add_(1)
        with pytest.raises(StaleError, match=r"laplace: .*(bias|running_mean) moved .* call laplace"):
            ASKS[ask](posterior)
        net.load_state_dict(before)
    ASKS[ask](posterior)  # of the values that came back


def test_predictions_for_a_problem_of_another_function_are_refused():
    posterior = laplace(Problem(network(), nn.CrossEntropyLoss(), (X, LABELS)))
    other = network()
    other[1] = nn.ReLU()
    for ask in (posterior.predict, posterior.functional_variance, posterior.log_probability):
        with pytest.raises(ProblemError, match=r"laplace: .* ReLU"):
            ask(Problem(other, nn.CrossEntropyLoss(), (X, LABELS)))


def test_pictures():
    ax = classification().plot(factors=(0.1, 1, 10))
    assert ax.get_xscale() == "log"
    assert len(ax.lines) == 2
    line = torch.linspace(-2, 2, 30, dtype=D)[:, None]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).to(D)
    ax = laplace(Problem(net, nn.MSELoss(), (line, line.sin())), "ggn").predict(line).plot()
    assert len(ax.collections) == 2
    assert len(classification().predict(ASKED).plot().lines) == 3
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.filterwarnings("ignore")
def test_the_numbers_of_laplace_torch(structure, kind, monkeypatch):
    theirs = pytest.importorskip("laplace")
    net = network()
    target, loss = (LABELS, nn.CrossEntropyLoss()) if kind == "classification" else (TARGETS, nn.MSELoss())
    noise = {} if kind == "classification" else {"sigma": 0.7}
    backend = theirs.curvature.BackPackGGN if structure == "diag" else theirs.curvature.CurvlinopsGGN
    other = theirs.Laplace(
        net,
        kind,
        subset_of_weights="all",
        hessian_structure=structure,
        prior_precision=1.3,
        backend=backend,
        **({"sigma_noise": 0.7} if noise else {}),
    )
    monkeypatch.setattr(
        torch, "eye", lambda *size, **options: torch.diag(torch.ones(size[0], **{"dtype": D, **options}))
    )
    other.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, target), batch_size=8))
    matrix = {"kron": "kfac(joint=False)", "diag": "ggn_diagonal", "full": "ggn"}[structure]
    mine = laplace(Problem(net, loss, (X, target)), matrix, prior=1.3, **noise)
    assert mine.log_evidence() == pytest.approx(float(other.log_marginal_likelihood()), abs=1e-8)
    mean, variance = other._glm_predictive_distribution(ASKED)
    torch.testing.assert_close(mine.functional_variance(ASKED), variance)
    if kind == "classification":
        torch.testing.assert_close(mine.predict(ASKED).mean, other(ASKED, pred_type="glm", link_approx="probit"))
    else:
        torch.testing.assert_close(mine.predict(ASKED).mean, mean)

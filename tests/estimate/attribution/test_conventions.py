"""The signs and scales of other libraries and of the papers, as the documentation of influence states them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from curvalg import Identity, Problem, inverse, registry
from curvalg.estimate import influence, self_influence

D, N, Q = torch.float64, 30, 7


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def world(outputs=3):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, outputs)).to(D)
    data = [(random(n, 5, seed=n), torch.arange(n) % 3) for n in (N, Q)]
    return net, *data


def own_gradients(net, loss, X, y):
    """Gradients of the samples' own losses (n, D)."""

    def value(params, x, t):
        return loss(functional_call(net, params, (x[None],)), t[None])

    found = vmap(grad(value), (None, 0, 0))(dict(net.named_parameters()), X, y)
    return torch.cat([g.flatten(1) for g in found.values()], 1).detach()


def test_koh_and_liang():
    """I_up,loss(z, z') = −∇ℓ(z')ᵀ H⁻¹ ∇ℓ(z) is −N times a score: upweighting z by ε, where leaving it out is ε = −1/N."""
    net, (X, y), (A, b) = world()
    problem, queries = (Problem(net, nn.CrossEntropyLoss(), d) for d in ((X, y), (A, b)))
    damped = registry.build("hessian") + 1.0 * Identity
    found = influence(inverse(damped).lower(problem), queries).scores
    H = damped.lower(problem).to_dense()
    up = -own_gradients(net, F.cross_entropy, A, b) @ torch.linalg.solve(H, own_gradients(net, F.cross_entropy, X, y).T)
    assert torch.allclose(up, -N * found, rtol=1e-6, atol=1e-10)


def test_trak():
    """φ(z')ᵀ(ΦᵀΦ)⁻¹φ(z)(1 − p) with gradients φ of the margin: the score is that of ℓ = log(1 + e⁻ᶠ), with the other sign.

    Park et al., arXiv 2303.14186, equation 17 for one model and without a projection.
    """
    net, (X, y), (A, b) = world()

    class Margins(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, batch):
            x, labels = batch
            z = self.net(x)
            right = F.one_hot(labels, 3).bool()
            return (z[right] - z[~right].reshape(len(z), 2).logsumexp(1))[:, None]

    def problem_of(loss, x, labels):
        return Problem(Margins(), loss, ((x, labels), torch.ones(len(x), 1, dtype=D)))

    problem = problem_of(lambda f, t: F.softplus(-f).sum(), X, y)
    queries = problem_of(lambda f, t: f.sum(), A, b)
    jacobian = registry.build("jacobian")
    op = inverse(jacobian.T @ jacobian + 1e-2 * Identity).lower(problem)
    found = influence(op, queries).scores

    def margin(z, t):
        right = torch.arange(3) == t
        return (z[0] * right).sum() - (z[0] + torch.where(right, -torch.inf, 0.0)).logsumexp(0)

    φ, phi = own_gradients(net, margin, X, y), own_gradients(net, margin, A, b)
    p = net(X).softmax(1)[torch.arange(N), y].detach()
    scores = phi @ torch.linalg.solve(φ.T @ φ + 1e-2 * torch.eye(φ.shape[1], dtype=D), φ.T) * (1 - p)
    assert torch.allclose(scores, -found, rtol=1e-6, atol=1e-10)


def test_a_sum_loss_has_no_mean():
    """With a sum the shares are the own losses, and scores are N times those of a mean with the same matrix."""
    net, train, test = world()
    scores = {}
    for reduction in ("mean", "sum"):
        loss = nn.CrossEntropyLoss(reduction=reduction)
        op = (1.0 * Identity).lower(Problem(net, loss, train))
        scores[reduction] = influence(op, Problem(net, loss, test)).scores
    assert torch.allclose(scores["sum"], N * scores["mean"])


@pytest.mark.filterwarnings("ignore")  # of what is deprecated in torch and pandas since
def test_kronfluence(tmp_path):
    """Its scores and self-scores are N times ours for a mean loss: neither has a sign, and its gradients are of sums."""
    analyzer = pytest.importorskip("kronfluence.analyzer")
    arguments = pytest.importorskip("kronfluence.arguments")
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class OwnLosses(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    net, train, test = world()
    problem, queries = Problem(net, nn.CrossEntropyLoss(), train), Problem(net, nn.CrossEntropyLoss(), test)
    op = inverse(registry.build("ekfac", fisher="empirical") + 0.1 * Identity).lower(problem)
    ours, own = influence(op, queries).scores, self_influence(op)
    task = OwnLosses()
    made = analyzer.Analyzer("a", analyzer.prepare_model(net, task), task, cpu=True, output_dir=str(tmp_path))
    kinds = ("eigendecomposition", "activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")
    factors = arguments.FactorArguments("ekfac", use_empirical_fisher=True, **{f"{kind}_dtype": D for kind in kinds})
    made.fit_all_factors("f", TensorDataset(*train), factor_args=factors, per_device_batch_size=10)
    kinds = ("score", "per_sample_gradient", "precondition")
    scores = arguments.ScoreArguments(damping_factor=0.1, **{f"{kind}_dtype": D for kind in kinds})
    sets = {"query_dataset": TensorDataset(*test), "train_dataset": TensorDataset(*train)}
    made.compute_pairwise_scores("s", "f", **sets, per_device_query_batch_size=Q, score_args=scores)
    made.compute_self_scores("t", "f", sets["train_dataset"], score_args=scores)
    theirs = made.load_pairwise_scores("s")["all_modules"].to(D)
    assert torch.allclose(theirs, N * ours, rtol=1e-5, atol=1e-8)
    assert torch.allclose(made.load_self_scores("t")["all_modules"].to(D), N * own, rtol=1e-5, atol=1e-8)

"""Softmax and logistic losses in float32 at saturated outputs, where 1 − p is all there is, against plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvalg import Problem, registry
from curvalg.losses import BCEWithLogits, CrossEntropy, KLDivWithLogits

CASES = [(2, 1.0), (2, 8.0), (2, 30.0), (10, 1.0), (10, 5.0), (10, 20.0), (1000, 1.0), (1000, 5.0), (1000, 20.0)]


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def logits(classes: int, scale: float, rows: int = 16) -> torch.Tensor:
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(classes))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def exact_p(z: torch.Tensor) -> torch.Tensor:
    return z.double().softmax(1)


def one_hot(y: torch.Tensor, classes: int) -> torch.Tensor:
    return nn.functional.one_hot(y, classes).double()


def deviations(z: torch.Tensor) -> torch.Tensor:
    """p_i − e_k (rows, k, class) in float64, without the cancellation of 1 − p."""
    p = exact_p(z)
    classes = p.shape[1]
    table = p[:, None].expand(-1, classes, -1).clone()
    rest = torch.stack([torch.cat([p[:, :k], p[:, k + 1 :]], 1).sum(1) for k in range(classes)], 1)
    table[:, range(classes), range(classes)] = -rest
    return table


@pytest.mark.parametrize("classes, scale", CASES)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_products_with_b(classes, scale, offset):
    z = logits(classes, scale)
    t = random(16, classes) + offset
    point = CrossEntropy().at(z, z.argmax(1))
    p, d = exact_p(z), t.double() - t.double().gather(1, z.argmax(1, keepdim=True))
    exact = p * (d - (p * d).sum(1, keepdim=True))
    # Row by row: a saturated one counts for little in the whole.
    for got, want in zip(point.hvp(t), exact, strict=True):
        assert relative(got, want) < 1e-5
    many = torch.func.vmap(point.hvp)(torch.stack([t, 2 * t]))
    assert torch.equal(many[0], point.hvp(t))


@pytest.mark.parametrize("classes, scale", CASES)
@pytest.mark.parametrize("kind", ["labels", "other labels", "soft", "kl", "weights"])
def test_gradients(classes, scale, kind):
    z = logits(classes, scale)
    y = z.argmax(1)
    if kind == "other labels":
        y = (y + 1) % classes
    q = one_hot(y, classes)
    omega = torch.rand(classes, generator=torch.Generator().manual_seed(0)) + 0.5
    if kind in ("soft", "kl"):
        point = (CrossEntropy() if kind == "soft" else KLDivWithLogits()).at(z, q.float())
    else:
        point = CrossEntropy(weight=omega if kind == "weights" else None).at(z, y)
    exact = deviations(z)[range(len(y)), y]
    if kind == "weights":
        exact = exact * omega[y].double()[:, None]
    for got, want in zip(point.gradient(), exact, strict=True):
        assert relative(got, want) < 1e-5


def test_gradients_with_smoothing_are_unchanged():
    z, y = logits(7, 3.0).double(), torch.arange(16) % 7
    for smoothing in (0.0, 0.1, 1.0):
        point = CrossEntropy(label_smoothing=smoothing).at(z, y)
        leaf = z.clone().requires_grad_()
        loss = nn.functional.cross_entropy(leaf, y, label_smoothing=smoothing, reduction="sum")
        assert torch.allclose(point.gradient(), torch.autograd.grad(loss, leaf)[0], atol=1e-14)


@pytest.mark.parametrize("classes, scale", [case for case in CASES if case[0] < 1000])
def test_factors_and_draws(classes, scale):
    z, y = logits(classes, scale), torch.zeros(16, dtype=torch.long)
    point, t = CrossEntropy().at(z, y), random(16, classes)
    p, d = exact_p(z), t.double() - t.double().gather(1, z.argmax(1, keepdim=True))
    exact = p * (d - (p * d).sum(1, keepdim=True))
    L = point.factor()
    got = (L * (L * (t - t.gather(1, z.argmax(1, keepdim=True)))).sum(2, keepdim=True)).sum(0)
    assert all(relative(a, b) < 1e-5 for a, b in zip(got, exact, strict=True))
    uniform = torch.rand(64, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    table = deviations(z)
    for draw in point.pseudo_gradients(uniform):
        nearest = (draw[:, None].double() - table).norm(dim=2) / table.norm(dim=2)
        assert (nearest.amin(1) < 1e-5).all()


@pytest.mark.parametrize("scale", [1.0, 10.0, 80.0])
def test_logistic_losses(scale):
    z, t = scale * random(64, 2), torch.rand(64, 2).round()
    point, x = BCEWithLogits().at(z, t), z.double()
    first = (1 - t.double()) / (1 + (-x).exp()) - t.double() / (1 + x.exp())
    second = 1 / (2 + x.exp() + (-x).exp())
    normal = first.abs() > 1e-36
    assert (((point.gradient().double() - first) / first).abs()[normal] < 1e-5).all()
    normal = second > 1e-36
    assert (((point.hvp(torch.ones_like(z)).double() - second) / second).abs()[normal] < 1e-5).all()
    assert (((point.factor()[0].double() - second.sqrt()) / second.sqrt()).abs()[normal] < 1e-5).all()


@pytest.fixture(scope="module")
def models():
    """A saturated linear model in float32, and the same numbers in float64."""
    torch.manual_seed(0)
    model, x = nn.Linear(6, 5), torch.randn(4000, 6)
    with torch.no_grad():
        model.weight.mul_(12)
        z = model(x)
    first, second = z.topk(2, dim=1).values.T
    x = x[(first - second > 8) & (first - second < 14)][:40]
    y = model(x).argmax(1)
    double = nn.Linear(6, 5).double()
    double.load_state_dict(model.state_dict())
    loss = nn.CrossEntropyLoss()
    return Problem(model, loss, (x, y)), Problem(double, loss, (x.double(), y)), x.double(), y, double


def moments(x: torch.Tensor, y: torch.Tensor, model: nn.Linear):
    """g_ik as rows (n, k, D), and w_ik, in float64."""
    z = model(x).detach()
    cotangents = deviations(z)
    inputs = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    weight = torch.einsum("nkc,nd->nkcd", cotangents, inputs[:, :-1]).flatten(2)
    return torch.cat([weight, cotangents], 2), z.softmax(1) / len(x)


def reference(name: str, x: torch.Tensor, y: torch.Tensor, model: nn.Linear) -> torch.Tensor:
    g, w = moments(x, y, model)
    if name == "ggn":
        return torch.einsum("nk,nki,nkj->ij", w, g, g)
    if name == "covariance":
        own = g[range(len(y)), y]
        return own.T @ own / len(y)
    classes, size = g.shape[1:]
    total = torch.zeros(size, size).double()
    for c in y.unique().tolist():
        rows, weights = g[y == c], w[y == c]
        mass = weights.sum(0)
        means = torch.einsum("nk,nkd->kd", weights, rows) / mass[:, None]
        spread = rows - means
        others = [k for k in range(classes) if k != c]
        mean = (mass[others, None] * means[others]).sum(0) / mass[others].sum()
        total += {
            "ggn_within": lambda weights=weights, spread=spread: torch.einsum(
                "nk,nki,nkj->ij", weights, spread, spread
            ),
            "ggn_same": lambda c=c, mass=mass, means=means: mass[c] * torch.outer(means[c], means[c]),
            "ggn_class": lambda mass=mass, mean=mean, others=others: mass[others].sum() * torch.outer(mean, mean),
            "ggn_cross": lambda mass=mass, means=means, mean=mean, others=others: torch.einsum(
                "k,ki,kj->ij", mass[others], means[others] - mean, means[others] - mean
            ),
        }[name]()
    return total


@pytest.mark.parametrize("name", ["ggn", "covariance", "ggn_within", "ggn_same", "ggn_class", "ggn_cross"])
def test_terms_on_a_saturated_model(name, models):
    single, _, x, y, model = models
    exact = reference(name, x, y, model)
    assert torch.einsum("ii", exact) > 0
    v = random(single.size, 4)
    got = registry.build(name).lower(single) @ v
    assert relative(got, exact @ v.double()) < 3e-5

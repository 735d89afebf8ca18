"""Small models whose training samples are scored, with gradients of single samples in plain torch."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from curvalg import Identity, Problem, block_diagonal, inverse, registry
from curvalg.losses import CrossEntropy

D = torch.float64
build = registry.build


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


class Sequences(nn.Module):
    """Words, a layer that mixes places, and a word for each place."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(7, 6), nn.LayerNorm(6)
        self.mix, self.head = nn.Linear(6, 10), nn.Linear(10, 7)

    def forward(self, words):
        h = self.norm(self.table(words))
        return self.head(torch.tanh(self.mix(h + h.cumsum(1) / 4)))


def dense(seed=0):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).to(D)
    return net, nn.CrossEntropyLoss(), lambda n, seed: (random(n, 9, seed=seed), torch.arange(n) % 3)


def images():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2, stride=2), nn.Flatten(), nn.Linear(16, 3)]
    net = nn.Sequential(*layers).to(D)
    return net, nn.CrossEntropyLoss(), lambda n, seed: (random(n, 2, 6, 6, seed=seed), torch.arange(n) % 3)


class Transposed(nn.Module):
    """Weights that lie inputs first, as a matrix and as a kernel."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose1d(3, 4, 3)
        self.matrix = nn.Parameter(torch.randn(16, 3))

    def forward(self, x):
        return torch.tanh(self.up(x)).flatten(1) @ self.matrix


def transposed():
    torch.manual_seed(0)
    net = Transposed().to(D)
    return net, nn.CrossEntropyLoss(), lambda n, seed: (random(n, 3, 2, seed=seed), torch.arange(n) % 3)


def words():
    torch.manual_seed(0)
    net = Sequences().to(D)

    def data(n, seed):
        drawn = torch.randint(0, 7, (n, 6), generator=torch.Generator().manual_seed(seed))
        return drawn[:, :-1], drawn[:, 1:]

    return net, CrossEntropy(class_axis=-1), data


MODELS = {"dense": dense, "images": images, "transposed": transposed, "words": words}
MATRICES = {
    "ekfac": lambda: inverse(build("ekfac") + 0.1 * Identity),
    "kfac": lambda: inverse(build("kfac") + 0.1 * Identity),
    "kfac apart": lambda: inverse(build("kfac", joint=False) + 0.1 * Identity),
    "ekfac itself": lambda: build("ekfac"),
    "damped by name": lambda: inverse(build("kfac") + block_diagonal(build("ggn_diagonal"))),
    "diagonal": lambda: inverse(build("ggn_diagonal") + 0.1 * Identity),
    "gram": lambda: inverse(build("covariance") + 0.1 * Identity, solver="gram"),
    "dense": lambda: inverse(build("ggn") + 0.1 * Identity, solver="dense"),
    "cg": lambda: inverse(build("ggn") + 0.5 * Identity, solver="cg", rtol=1e-12),
    "identity": lambda: 1.0 * Identity,
}


def gradients(net, loss, X, y, scale):
    """Gradients of the own losses of all samples times a number, (n, D), by torch.func alone."""
    params = dict(net.named_parameters())

    def own(ps, x, t):
        z = functional_call(net, ps, (x[None],))
        return nn.functional.cross_entropy(z.reshape(-1, z.shape[-1]), t.reshape(-1))

    found = vmap(grad(own), (None, 0, 0))(params, X, y)
    return scale * torch.cat([g.flatten(1) for g in found.values()], 1).detach()


def world(name, samples="item", **options):
    net, loss, data = MODELS[name]()
    train, test = data(14, 1), data(9, 2)
    batches = [tuple(t[:8] for t in train), tuple(t[8:] for t in train)]
    problem = Problem(net, loss, batches, samples=samples, **options)
    queries = Problem(net, loss, [tuple(t[:5] for t in test), tuple(t[5:] for t in test)], samples=samples)
    return problem, queries, gradients(net, loss, *train, 1 / 14), gradients(net, loss, *test, 1.0)


def close(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).norm() <= 1e-8 * float(expected.norm())

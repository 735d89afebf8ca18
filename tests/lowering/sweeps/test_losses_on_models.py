"""Every loss and option, weighted, padded and ragged together, by item and by position, on a network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvalg import LossError, Problem, registry
from curvalg.losses import CrossEntropy, KLDivWithLogits
from tests.support.dense import Case, Dense

torch.manual_seed(3)
W = torch.tensor([0.5, 2.0, 1.0]).double()
X = torch.randn(7, 4).double()
TOKENS = torch.randint(0, 6, (7, 4))
CLASSES = torch.tensor([0, 2, 1, 1, 0, 2, 2])
SOFT = torch.rand(7, 3).double().softmax(1)
REAL = torch.randn(7, 3).double()
UNIT = torch.rand(7, 3).double()
COUNTS = torch.poisson(2 * torch.rand(7, 3)).double()
PADDED = torch.randint(0, 3, (7, 4))
PADDED[0, 2:] = PADDED[3, 1:] = -100
PADDED[5] = -100


class Net(nn.Module):
    def __init__(self, positive: bool = False) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 3)
        self.positive = positive

    def forward(self, x):
        z = self.head(torch.tanh(self.body(x)))
        return F.softplus(z) + 0.2 if self.positive else z


class Tokens(nn.Module):
    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.embed, self.head, self.last = nn.Embedding(6, 2), nn.Linear(2, 3), last

    def forward(self, x):
        z = self.head(torch.tanh(self.embed(x)).cumsum(1))
        return z if self.last else z.transpose(1, 2)


def _ce(z, y, **kw):
    return F.cross_entropy(z, y, reduction="none", **kw)


def _smooth_soft(z, q, w, eps):
    q = (1 - eps) * q + eps / 3
    return -(w[:, None] * q.movedim(1, 0) * F.log_softmax(z, 1).movedim(1, 0)).sum(0)


def rows(f):
    return lambda z, y: f(z, y).reshape(len(y), -1).sum(1)


PW = torch.tensor([1.0, 3.0, 0.5]).double()
# name: (model, inputs, target, loss, unreduced loss, denominator of the whole data set)
CASES = {
    "cross entropy": (Net, X, CLASSES, nn.CrossEntropyLoss(), _ce, 7.0),
    "cross entropy, sum": (Net, X, CLASSES, nn.CrossEntropyLoss(reduction="sum"), _ce, None),
    "class weights": (Net, X, CLASSES, nn.CrossEntropyLoss(W), lambda z, y: _ce(z, y, weight=W), float(W[CLASSES].sum())),
    "weights and smoothing": (
        Net, X, CLASSES, nn.CrossEntropyLoss(W, label_smoothing=0.2),
        lambda z, y: _ce(z, y, weight=W, label_smoothing=0.2), float(W[CLASSES].sum()),
    ),
    "soft labels, weighted, smoothed": (
        Net, X, SOFT, nn.CrossEntropyLoss(W, label_smoothing=0.3), lambda z, q: _smooth_soft(z, q, W, 0.3), 7.0,
    ),
    "padded tokens": (Tokens, TOKENS, PADDED, nn.CrossEntropyLoss(), _ce, float((PADDED >= 0).sum())),
    "padded, weighted, smoothed tokens": (
        Tokens, TOKENS, PADDED, nn.CrossEntropyLoss(W, label_smoothing=0.1),
        lambda z, y: _ce(z, y, weight=W, label_smoothing=0.1), float(W[PADDED[PADDED >= 0]].sum()),
    ),
    "tokens, classes last": (
        lambda: Tokens(True), TOKENS, PADDED, CrossEntropy(weight=W, class_axis=-1),
        lambda z, y: _ce(z.transpose(1, 2), y, weight=W), float(W[PADDED[PADDED >= 0]].sum()),
    ),
    "functional": (Net, X, CLASSES, F.cross_entropy, _ce, 7.0),
    "mse": (Net, X, REAL, nn.MSELoss(), lambda z, y: (z - y) ** 2, 21.0),
    "mse, sum": (Net, X, REAL, nn.MSELoss(reduction="sum"), lambda z, y: (z - y) ** 2, None),
    "bce": (Net, X, UNIT, nn.BCEWithLogitsLoss(), lambda z, y: F.binary_cross_entropy_with_logits(z, y, reduction="none"), 21.0),
    "bce, weights and pos_weight": (
        Net, X, UNIT, nn.BCEWithLogitsLoss(weight=W, pos_weight=PW),
        lambda z, y: F.binary_cross_entropy_with_logits(z, y, W, reduction="none", pos_weight=PW), 21.0,
    ),
    "poisson": (Net, X, COUNTS, nn.PoissonNLLLoss(), lambda z, y: z.exp() - y * z, 21.0),
    "poisson, rates, full": (
        lambda: Net(True), X, COUNTS, nn.PoissonNLLLoss(log_input=False, full=True, eps=1e-3),
        lambda z, y: z - y * (z + 1e-3).log(), 21.0,
    ),
    "huber": (Net, X, REAL, nn.HuberLoss(delta=0.7), lambda z, y: F.huber_loss(z, y, reduction="none", delta=0.7), 21.0),
    "smooth l1": (Net, X, REAL, nn.SmoothL1Loss(beta=0.6), lambda z, y: F.smooth_l1_loss(z, y, reduction="none", beta=0.6), 21.0),
    "kl of logits": (
        Net, X, SOFT, KLDivWithLogits(), lambda z, q: F.kl_div(F.log_softmax(z, 1), q, reduction="none").sum(1), 7.0,
    ),
    "callable, mean": (Net, X, REAL, lambda z, y: ((z - y) ** 4).sum(1).mean(), lambda z, y: (z - y) ** 4, 7.0),
    "callable, sum": (Net, X, REAL, lambda z, y: torch.cosh(z - y).sum(), lambda z, y: torch.cosh(z - y), None),
}  # fmt: skip


def _case(name, samples):
    model, inputs, target, loss, unreduced, denominator = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        module = model().double()
    cuts = [0, 1, 4, 7]
    batches = [(inputs[a:b], target[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    positions = (lambda z, y: unreduced(z, y).reshape(-1)) if samples != "item" else rows(unreduced)
    return Case(module, loss, batches, positions, denominator, options={"samples": samples})


def _samples(name):
    """A row, and the finest that a sample of a loss can be."""
    elementwise = not name.startswith("callable") and name.split(",")[0] in (
        *("mse", "bce", "poisson", "huber"),
        "smooth l1",
    )
    return ["item", "element" if elementwise else "position"]


def _count(name, samples, target):
    if name.startswith(("padded", "tokens")):
        used = target >= 0
        return int(used.sum() if samples == "position" else used.any(1).sum())
    return None


@pytest.mark.parametrize("finest", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_terms_equal_dense(name, finest, vectors):
    samples = _samples(name)[finest]
    if name.startswith("callable") and samples == "position":
        with pytest.raises(LossError, match="where its positions are"):
            Problem(_case(name, samples).model, CASES[name][3], (X, REAL), samples=samples)
        return
    case = _case(name, samples)
    case.count = _count(name, samples, CASES[name][2])
    dense = Dense(case)
    problem = Problem(case.model, case.loss, case.batches, samples=samples)
    V = vectors(dense.D)
    for term in ("hessian", "ggn", "covariance", "centered_covariance"):
        got, expected = registry.build(term).lower(problem) @ V, dense.matrix(term) @ V
        assert (got - expected).norm() <= 1e-10 * expected.norm(), term
    assert (problem.gradient() - dense.gradient).norm() <= 1e-10 * dense.gradient.norm()


@pytest.mark.parametrize(
    "name", ["weights and smoothing", "padded tokens", "bce, weights and pos_weight", "poisson", "mse"]
)
@pytest.mark.parametrize("finest", [0, 1])
def test_monte_carlo_is_built_from_its_draws_and_ignores_batch_splits(name, finest, vectors):
    samples = _samples(name)[finest]
    case = _case(name, samples)
    J = Dense(case).jacobian
    problem = Problem(case.model, case.loss, case.batches, samples=samples)
    draws = []
    with problem.differentiating():
        for e in problem.evaluations(problem.snapshot()):
            s = e.evaluate().pseudo_gradients(2, seed=4)
            draws.append(s.reshape(2, -1))
    S = torch.cat(draws, 1)
    n = len(case.batches[0][0]) + len(case.batches[1][0]) + len(case.batches[2][0])
    if samples == "item":
        per = S.reshape(2, n, -1)
        middle = sum(torch.block_diag(*[torch.outer(row, row) for row in draw]) for draw in per)
    elif "padded" in name or "smoothing" in name:  # per position over classes: (n, C, T) layout
        width = S.shape[1] // n
        shape = (2, n, 3, width // 3)
        middle = torch.zeros(S.shape[1], S.shape[1]).double()
        index = torch.arange(S.shape[1]).reshape(n, 3, -1)
        for draw in S.reshape(shape):
            for i in range(n):
                for t in range(shape[3]):
                    at = index[i, :, t]
                    middle[at[:, None], at] += torch.outer(draw[i, :, t], draw[i, :, t])
    else:
        middle = torch.diag((S**2).sum(0))
    expected = J.T @ middle @ J
    term = registry.build("ggn_mc", samples=2, seed=4)
    V = vectors(len(expected))
    got = term.lower(problem) @ V
    assert (got - expected @ V).norm() <= 1e-10 * (expected @ V).norm()
    whole = Problem(case.model, case.loss, tuple(map(torch.cat, zip(*case.batches, strict=True))), samples=samples)
    assert (term.lower(whole) @ V - got).norm() <= 1e-10 * got.norm()
    if samples == "item" or problem.loss.class_axis is not None:  # signs of single elements leave no trace in s sᵀ
        assert (registry.build("ggn_mc", samples=2, seed=5).lower(problem) @ V - got).norm() > 1e-3 * got.norm()


def test_gaussian_nll_fisher_is_its_own_matrix(dense_of, problem_of, vectors):
    dense, problem = dense_of("gaussian_nll"), problem_of("gaussian_nll")
    case_rows, blocks = [], []
    for x, _ in problem.data.source:
        _, v = problem.model.module(x)
        blocks += [torch.diag(torch.cat([1 / r, 1 / (2 * r**2)])) / 14 for r in v.detach()]
        case_rows.append(x)
    expected = dense.jacobian.T @ torch.block_diag(*blocks) @ dense.jacobian
    V = vectors(dense.D)
    assert (registry.build("fisher").lower(problem) @ V - expected @ V).norm() <= 1e-10 * (expected @ V).norm()
    many = registry.build("fisher_mc", samples=4000).lower(problem).to_dense()
    assert (many - expected).norm() <= 0.1 * expected.norm()

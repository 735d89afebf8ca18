"""Means over uneven batches and padding, and the empirical Fisher: global counts, whatever the batches."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader, TensorDataset

from curvalg import Problem, ProblemError, registry
from curvalg.losses import CrossEntropy
from tests.support.dense import Case, Dense
from tests.support.field.data import (
    CE,
    PAIRS,
    SENTENCES,
    TAGS,
    N,
    R,
    X,
    Y,
    ce,
    lower,
    mse,
    ones,
)


def rng():
    return torch.Generator().manual_seed(2)


class Tagger(nn.Module):
    """Classes of every token, (B, C, T); a position sees those before it, so padding at the end changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 2), nn.Linear(2, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.embed(tokens).cumsum(1))).transpose(1, 2)


@pytest.fixture
def tagger(build_net):
    return build_net(Tagger)


# -- wrong mean with an uneven last batch -> global counts ------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6, 7, 9])
def test_uneven_last_batch_of_a_mean_loss(size, net, whole, agrees):
    problem = Problem(net, CE, DataLoader(PAIRS, batch_size=size))
    agrees(problem, whole)
    assert problem.num_samples == N
    assert abs(problem.value() - CE(net(X), Y).item()) < 1e-12


def test_uneven_last_batch_is_not_the_average_of_batch_means(net, whole):
    """The reference tells the two apart: batches of 3, 3 and 1 rows."""
    means = [Dense(Case(net, CE, [b], ce, float(len(b[1])))).hessian for b in DataLoader(PAIRS, batch_size=3)]
    assert (sum(means) / 3 - whole.hessian).norm() > 1e-2 * whole.hessian.norm()


@pytest.mark.parametrize(
    "loss",
    [lambda z, y: (z - y).square().mean(), partial(F.mse_loss), nn.MSELoss()],
    ids=["callable", "function", "module"],
)
def test_uneven_last_batch_of_a_regression(loss, net, dense, agrees):
    reference = dense(net, [(X, R)], mse, float(R.numel()))
    agrees(Problem(net, loss, DataLoader(TensorDataset(X, R), batch_size=3)), reference)


def test_uneven_last_batch_of_a_sum_loss(net, dense, agrees):
    reference = dense(net, [(X, R)], mse, None)
    for loss in (nn.MSELoss(reduction="sum"), lambda z, y: (z - y).square().sum()):
        agrees(Problem(net, loss, DataLoader(TensorDataset(X, R), batch_size=3)), reference)


def test_uneven_last_batch_dropped_by_the_loader_is_not_counted(net, dense, agrees):
    problem = Problem(net, CE, DataLoader(PAIRS, batch_size=3, drop_last=True))
    agrees(problem, dense(net, [(X[:6], Y[:6])], ce, 6.0))
    assert problem.num_samples == 6


def test_uneven_batches_one_of_them_empty(net, whole, agrees):
    agrees(Problem(net, CE, [(X[:2], Y[:2]), (X[:0], Y[:0]), (X[2:], Y[2:])]), whole)


def padded(label):
    """Ragged batches of padded sentences: (3, 4), (2, 5), (1, 2)."""
    return [
        (
            pad_sequence(SENTENCES[a:b], batch_first=True, padding_value=5),
            pad_sequence(TAGS[a:b], batch_first=True, padding_value=label),
        )
        for a, b in ((0, 3), (3, 5), (5, 6))
    ]


def unpadded(samples):
    """The reference never sees padding: a batch for every sentence."""
    batches = [(s[None], t[None]) for s, t in zip(SENTENCES, TAGS, strict=True)]
    return batches, (lambda z, y: ce(z, y).sum(1)) if samples == "item" else (lambda z, y: ce(z, y).reshape(-1))


@pytest.mark.parametrize("samples", ["item", "position"])
@pytest.mark.parametrize("label", [-100, 7])
def test_padding_and_variable_length_count_tokens_over_all_batches(label, samples, tagger, dense, agrees):
    batches, rows = unpadded(samples)
    tokens = sum(map(len, TAGS))
    reference = dense(tagger, batches, rows, float(tokens))
    problem = Problem(tagger, nn.CrossEntropyLoss(ignore_index=label), padded(label), samples=samples)
    agrees(problem, reference)
    assert problem.num_samples == (len(SENTENCES) if samples == "item" else tokens)
    with torch.no_grad():
        expected = sum(ce(tagger(s[None]), t[None]).sum().item() for s, t in zip(SENTENCES, TAGS, strict=True)) / tokens
    assert abs(problem.value() - expected) < 1e-12


def test_padding_does_not_depend_on_how_far_batches_are_padded(tagger, vectors):
    far = [(F.pad(s, (0, 3), value=1), F.pad(t, (0, 3), value=-100)) for s, t in padded(-100)]
    near = Problem(tagger, CE, padded(-100))
    V = vectors(near.size)
    for name in ("hessian", "centered_covariance"):
        got, expected = (lower(name, p) @ V for p in (Problem(tagger, CE, far), near))
        assert (got - expected).norm() < 1e-12


def test_padding_labels_are_ignored_whole_rows_and_batches_too(tagger, dense, agrees):
    tokens = torch.randint(0, 6, (4, 3), generator=rng())
    labels = torch.tensor([[0, 1, -100], [-100] * 3, [2, 2, 0], [-100] * 3])
    data = [(tokens[:2], labels[:2]), (tokens[2:3], labels[2:3]), (tokens[3:], labels[3:])]
    keep = torch.tensor([0, 2])
    reference = dense(tagger, [(tokens[keep], labels[keep])], lambda z, y: ce(z, y).sum(1), 5.0, count=2)
    problem = Problem(tagger, CE, data)
    agrees(problem, reference)
    assert problem.num_samples == 2


def test_padding_everywhere_leaves_nothing_to_average(tagger):
    problem = Problem(tagger, CE, (torch.zeros(2, 3).long(), torch.full((2, 3), -100)))
    with pytest.raises(ProblemError, match="ignored"):
        lower("ggn", problem)


def test_padding_in_a_packed_sequence(build_net, dense, agrees):
    """Sentences of variable length as a PackedSequence, read by a recurrent layer."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(2, 2, batch_first=True), nn.Linear(2, 3)

        def forward(self, x):
            h = self.rnn(x)[0]
            if isinstance(h, PackedSequence):
                h, lengths = pad_packed_sequence(h, batch_first=True)
                last = h[torch.arange(len(h)), lengths - 1]
            else:
                last = h[:, -1]
            return self.head(last)

    model = build_net(Packed)
    series = torch.randn(8, 2, generator=rng()).double().split((2, 3, 1, 2))
    y = torch.tensor([0, 2, 1, 1])
    data = [(pack_sequence(series[a:b], enforce_sorted=False), y[a:b]) for a, b in ((0, 3), (3, 4))]
    reference = dense(model, [(s[None], t[None]) for s, t in zip(series, y, strict=True)], ce, 4.0)
    agrees(Problem(model, CE, data), reference, terms=("hessian", "ggn", "covariance"))


# -- empirical Fisher from per-sample gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_empirical_fisher_does_not_depend_on_the_batch_size(size, net, whole, agrees):
    problem = Problem(net, CE, DataLoader(PAIRS, batch_size=size))
    agrees(problem, whole, terms=("covariance", "centered_covariance"))
    diagonal = registry.build("covariance_diagonal").lower(problem)
    assert torch.allclose(diagonal @ ones(diagonal), whole.covariance.diag(), atol=1e-12)
    assert torch.allclose(lower("empirical_fisher", problem).to_dense(), whole.covariance, atol=1e-12)


def test_empirical_fisher_is_the_mean_of_outer_products_of_per_sample_gradients(net, whole):
    by_hand = torch.zeros(24, 24).double()
    for x, y in zip(X, Y, strict=True):
        g = torch.autograd.grad(CE(net(x[None]), y[None]), list(net.parameters()))
        flat = torch.cat([t.reshape(-1) for t in g])
        by_hand += torch.outer(flat, flat) / N
    got = lower("covariance", Problem(net, CE, DataLoader(PAIRS, batch_size=4))).to_dense()
    assert torch.allclose(got, by_hand, atol=1e-12)
    squared_mean = torch.outer(whole.gradient, whole.gradient)
    assert (got - squared_mean).norm() > 0.1 * got.norm()


def test_empirical_fisher_of_a_sum_loss_has_no_factor(net, dense, agrees):
    reference = dense(net, [(X, Y)], ce, None)
    agrees(
        Problem(net, CrossEntropy(reduction="sum"), DataLoader(PAIRS, batch_size=4)), reference, terms=("covariance",)
    )

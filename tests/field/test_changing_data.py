"""Loaders that shuffle or augment: right, or detected and explained."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from curvalg import ProblemError
from tests.support.field.data import (
    AUGMENTATIONS,
    CE,
    PAIRS,
    Augmented,
    N,
    OwnMapping,
    X,
    Y,
    ce,
    fresh,
    lower,
    ones,
)
from tests.support.third_party import CenteredTangent


@pytest.mark.parametrize("size", [2, 7])
def test_shuffling_loader_leaves_additive_terms_right(size, net, whole, agrees):
    agrees(fresh(net, CE, DataLoader(PAIRS, batch_size=size, shuffle=True)), whole)


SHUFFLED = {
    "shuffle": lambda size: DataLoader(PAIRS, batch_size=size, shuffle=True),
    "sampler": lambda size: DataLoader(PAIRS, batch_size=size, sampler=RandomSampler(PAIRS)),
    "batch sampler": lambda size: DataLoader(PAIRS, batch_sampler=BatchSampler(RandomSampler(PAIRS), size, False)),
    "own iterable": lambda size: Reshuffled(size),
}


class Reshuffled:
    """Re-iterable, another order in every pass."""

    def __init__(self, size):
        self.size, self.rng = size, torch.Generator().manual_seed(3)

    def __iter__(self):
        order = torch.randperm(N, generator=self.rng)
        return ((X[k], Y[k]) for k in order.split(self.size))


@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("kind", SHUFFLED)
@pytest.mark.parametrize("name", ["jacobian", "loss_hessian"])
def test_shuffling_loader_is_refused_where_rows_have_an_order(name, kind, size, net):
    problem = fresh(net, CE, SHUFFLED[kind](size))
    with pytest.raises(ProblemError, match=r"shuffle=False.*list\(loader\)"):
        op = lower(name, problem)
        for _ in range(3):
            op @ ones(op)


@pytest.mark.parametrize("cache", [0, "auto"])
@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("kind", SHUFFLED)
def test_shuffling_loader_never_changes_monte_carlo_draws_silently(kind, size, cache, net):
    """Draws are keyed by the number of the sample in the data: refused, or the same matrix in every product."""
    try:
        op = lower("ggn_mc", fresh(net, CE, SHUFFLED[kind](size), cache=cache))
        first, *others = [op @ ones(op) for _ in range(4)]
    except ProblemError as error:
        assert "shuffle=False" in str(error)
    else:
        assert all(torch.allclose(first, other, atol=1e-12) for other in others)


@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("kind", SHUFFLED)
def test_shuffling_loader_with_frozen_randomness_is_refused(kind, size, build_net):
    """The masks are replayed by position in the batch, so other rows would meet them in every pass."""
    model = build_net(lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    problem = fresh(model, CE, SHUFFLED[kind](size), randomness="frozen")
    with pytest.raises(ProblemError, match="order"):
        op = lower("ggn", problem)
        for _ in range(3):
            op @ ones(op)


@pytest.mark.parametrize("kind", SHUFFLED)
def test_shuffling_loader_with_batch_statistics_is_refused(kind, build_net):
    """Batch-norm in training mode: which samples share a batch decides the matrix."""
    model = build_net(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).train())
    with pytest.raises(ProblemError, match=r"order|shuffle"):
        op = lower("hessian", fresh(model, CE, SHUFFLED[kind](4)))
        for _ in range(3):
            op @ ones(op)


class Alternating:
    """Re-iterable; every second pass comes in another order, which a comparison with the first pass alone misses."""

    def __init__(self, *orders):
        self.orders, self.passes = orders, 0

    def __iter__(self):
        order = self.orders[self.passes % len(self.orders)]
        self.passes += 1
        return iter([(X[k], Y[k]) for k in order])


FORWARD, BACKWARD = torch.arange(N).split(2), torch.arange(N).flip(0).split(2)
WITHIN = (torch.tensor([1, 0, 2, 3, 4, 5, 6]),)


@pytest.mark.parametrize(
    "orders",
    [(FORWARD, BACKWARD, FORWARD), (FORWARD, FORWARD, BACKWARD), ((torch.arange(N),), WITHIN, (torch.arange(N),))],
    ids=["reduce", "product", "within a batch"],
)
def test_shuffling_between_the_two_passes_of_one_product_is_not_silent(orders, net):
    """Tangents of the first pass are used in the second: either refused, or right."""
    expected = CenteredTangent().lower(fresh(net, CE, (X, Y))) @ torch.ones(24).double()
    op = CenteredTangent().lower(fresh(net, CE, Alternating(*orders)))
    try:
        got = op @ ones(op)
    except ProblemError as error:
        assert "order" in str(error)
    else:
        assert torch.allclose(got, expected, atol=1e-12)


def test_shuffling_with_dropped_rows_or_replacement_is_another_matrix(net):
    for loader in (
        DataLoader(PAIRS, batch_size=3, shuffle=True, drop_last=True),
        DataLoader(PAIRS, batch_size=3, sampler=RandomSampler(PAIRS, replacement=True)),
    ):
        op = lower("hessian", fresh(net, CE, loader))
        with pytest.raises(ProblemError, match=r"differ from the first pass.*list\(loader\)"):
            for _ in range(20):
                op @ ones(op)


def test_shuffling_is_told_by_explain(net):
    text = lower("hessian", fresh(net, CE, DataLoader(PAIRS, batch_size=2, shuffle=True))).explain()
    assert "shuffles" in text


def test_list_of_a_shuffling_loader_fixes_one_pass(net, whole, agrees):
    batches = list(DataLoader(PAIRS, batch_size=2, shuffle=True))
    problem = fresh(net, CE, batches)
    agrees(problem, whole)
    J = lower("jacobian", problem)
    order = torch.cat([(x == X).all(1).nonzero()[0] for x in torch.cat([b[0] for b in batches])])
    expected = (whole.jacobian @ torch.ones(24).double()).reshape(N, 3)[order].reshape(-1)
    assert torch.allclose(J @ ones(J), expected, atol=1e-12)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_augmenting_loader_is_detected_and_explained(kind, shuffle, net):
    loader = DataLoader(Augmented(AUGMENTATIONS[kind]), batch_size=3, shuffle=shuffle)
    forward = (lambda m, b: m(b[0].real + b[0].imag)) if kind == "complex noise" else None
    op = lower("hessian", fresh(net, CE, loader, forward=forward))
    with pytest.raises(ProblemError, match=r"augmentation.*list\(loader\)"):
        for _ in range(4):
            op @ ones(op)


def test_augmenting_by_another_pairing_of_inputs_and_targets_is_detected(net):
    """The inputs of a pass are the same, and so are the targets, but not which belong together."""

    class Pairing:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([(X, Y.roll(self.passes - 1))])

    op = lower("hessian", fresh(net, CE, Pairing()))
    with pytest.raises(ProblemError, match="differ from the first pass"):
        op @ ones(op)


def test_augmenting_inside_a_mapping_of_another_class_is_detected(net):
    class Noisy:
        def __iter__(self):
            return iter([OwnMapping(x=X + torch.randn_like(X), labels=Y)])

    op = lower("hessian", fresh(net, CE, Noisy()))
    with pytest.raises(ProblemError, match="augmentation"):
        op @ ones(op)


def test_augmenting_loader_fixed_by_a_list(net, dense, agrees):
    batches = list(DataLoader(Augmented(AUGMENTATIONS["torch noise"]), batch_size=3))
    reference = dense(net, [tuple(torch.cat(t) for t in zip(*batches, strict=True))], ce, 7.0)
    agrees(fresh(net, CE, batches), reference)


def test_stateful_data_set_is_detected(net):
    class Counting(Dataset):
        calls = 0

        def __len__(self):
            return N

        def __getitem__(self, k):
            self.calls += 1
            return X[k] * (1 + self.calls), Y[k]

    op = lower("ggn", fresh(net, CE, DataLoader(Counting(), batch_size=3)))
    with pytest.raises(ProblemError, match="stateful"):
        op @ ones(op)

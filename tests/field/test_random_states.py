"""Random states of the user and of loaders do not move; loaders with worker processes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from curvalg import ProblemError
from tests.support.field.data import (
    AUGMENTATIONS,
    CE,
    PAIRS,
    Augmented,
    Net,
    X,
    Y,
    fresh,
    lower,
    ones,
)


def random_states(*generators):
    python, numpy = random.getstate(), np.random.get_state()
    return [torch.get_rng_state().tolist(), python, str(numpy), *(g.get_state().tolist() for g in generators)]


def test_random_states_of_the_user_and_the_loader_do_not_move(net):
    own = torch.Generator().manual_seed(5)
    loaders = [
        DataLoader(PAIRS, batch_size=2, shuffle=True),
        DataLoader(PAIRS, batch_size=2, shuffle=True, generator=own),
        DataLoader(PAIRS, batch_size=2, sampler=RandomSampler(PAIRS, generator=own)),
        DataLoader(PAIRS, batch_sampler=BatchSampler(RandomSampler(PAIRS, generator=own), 2, False)),
    ]
    for loader in loaders:
        before = random_states(own)
        problem = fresh(net, CE, loader)
        op = lower("hessian", problem)
        op @ ones(op), op @ ones(op), problem.value(), problem.gradient()
        assert random_states(own) == before


def test_random_states_do_not_move_when_a_product_fails(net):
    own = torch.Generator().manual_seed(5)
    for change in ("torch noise", "NumPy noise", "Python noise"):
        loader = DataLoader(Augmented(AUGMENTATIONS[change]), batch_size=2, shuffle=True, generator=own)
        before = random_states(own)
        op = lower("hessian", fresh(net, CE, loader))
        with pytest.raises(ProblemError):
            op @ ones(op)
        assert random_states(own) == before


def test_random_states_an_interrupted_epoch_of_the_users_goes_on(net):
    """The user iterates over the same loader while products are taken."""
    loader = DataLoader(PAIRS, batch_size=2, shuffle=True)
    torch.manual_seed(0)
    expected = [x for x, _ in loader]
    torch.manual_seed(0)
    op = lower("hessian", fresh(net, CE, loader))
    seen = []
    for x, _ in loader:
        op @ ones(op)
        seen.append(x)
    assert all(map(torch.equal, seen, expected))


@pytest.mark.parametrize("shuffle", [False, True])
def test_loader_with_worker_processes(shuffle, net, whole, agrees):
    before = random_states()
    problem = fresh(net, CE, DataLoader(PAIRS, batch_size=3, shuffle=shuffle, num_workers=2))
    agrees(problem, whole, terms=("hessian",), gradient=False)
    assert random_states() == before


def test_loader_with_persistent_worker_processes_that_augment_is_detected(net):
    data = Augmented(AUGMENTATIONS["torch noise"])
    loader = DataLoader(data, batch_size=3, num_workers=1, persistent_workers=True)
    op = lower("hessian", fresh(net, CE, loader))
    with pytest.raises(ProblemError, match="augmentation"):
        op @ ones(op)


def test_inputs_changed_in_place_by_the_model_are_not_silent(build_net):
    """x.mul_() in forward changes the user's data, and every product would be of another matrix."""

    class InPlace(Net):
        def forward(self, x):
            return super().forward(x.mul_(1.5))

    model, data = build_net(InPlace), (X.clone(), Y)
    op = lower("hessian", fresh(model, CE, data))
    try:
        first, second = op @ ones(op), op @ ones(op)
    except ProblemError as error:
        assert "place" in str(error)
    else:
        assert torch.equal(first, second)
        assert torch.equal(data[0], X)

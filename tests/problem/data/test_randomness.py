"""The guard around calls of the user's code."""

from __future__ import annotations

import copy
import pickle
import random
import sys

import numpy as np
import pytest
import torch

from curvalg.errors import ProblemError
from curvalg.problem.data import DrawGuard

DRAWS = {
    "torch": lambda: torch.rand(()).item(),
    "Python's random": random.random,
    "NumPy": np.random.rand,
    "a normal number of NumPy": np.random.randn,
    "a normal number of Python": lambda: random.gauss(0, 1),
}


def states():
    return torch.get_rng_state().tolist(), random.getstate(), pickle.dumps(np.random.get_state(legacy=False))


@pytest.fixture(params=[0, 1], ids=["nothing pending", "a normal number pending"])
def user(request):
    """The user's own draws before, after which half of a normal pair may wait in the state."""
    for _ in range(request.param):
        np.random.randn(), random.gauss(0, 1)


@pytest.mark.parametrize("kind", DRAWS)
def test_draws_are_refused_and_taken_back(kind, user):
    guard, before = DrawGuard("refuse"), states()
    for _ in range(3):
        with pytest.raises(ProblemError, match=rf"{kind.split()[-1]}.*model\.eval\(\).*randomness='frozen'"):
            guard.run(DRAWS[kind], 0)
        assert states() == before
        assert guard.run(lambda: 3, 0) == 3


@pytest.mark.parametrize("kind", DRAWS)
def test_frozen_draws_repeat_by_key_whatever_the_state(kind, user):
    guard, first = DrawGuard("frozen"), {}
    for k in range(3):
        torch.manual_seed(k), random.seed(k), np.random.seed(k)
        DRAWS[kind]()
        before = states()
        for key in (0, 1):
            assert guard.run(DRAWS[kind], key) == first.setdefault(key, guard.run(DRAWS[kind], key))
        assert states() == before
    assert first[0] != first[1]


@pytest.mark.parametrize("mode", ["refuse", "frozen"])
@pytest.mark.parametrize("kind", DRAWS)
def test_draws_are_taken_back_when_the_call_fails(kind, mode, user):
    def call():
        DRAWS[kind]()
        raise KeyError("own")

    before = states()
    with pytest.raises(KeyError, match="own"):
        DrawGuard(mode).run(call, 0)
    assert states() == before


def test_what_was_read_is_not_kept_for_another_state():
    """The user draws between calls: the state to go back to is the one at the call."""
    guard = DrawGuard("refuse")
    for draw in (lambda: None, np.random.rand, np.random.randn, np.random.randn, lambda: np.random.seed(3)):
        draw()
        before = states()
        for kind in ("NumPy", "a normal number of NumPy"):
            with pytest.raises(ProblemError, match="NumPy"):
                guard.run(DRAWS[kind], 0)
            assert states() == before


def test_other_bit_generators_of_numpy():
    own = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        before = states()
        with pytest.raises(ProblemError, match="NumPy"):
            DrawGuard("refuse").run(np.random.rand, 0)
        frozen = DrawGuard("frozen")
        assert frozen.run(np.random.randn, 0) == frozen.run(np.random.randn, 0) != frozen.run(np.random.randn, 1)
        assert states() == before
    finally:
        np.random.set_bit_generator(own)


def test_guards_are_copied():
    guard = DrawGuard("refuse")
    guard.run(lambda: None, 0)
    for twin in (copy.deepcopy(guard), pickle.loads(pickle.dumps(guard))):
        with pytest.raises(ProblemError):
            twin.run(np.random.rand, 0)


def test_a_call_without_draws_costs_little(inside):
    """Around every call of the model: a few function calls, none of which copies NumPy's state, which takes longest."""
    np.random.seed(0)  # no normal number pending
    guard, calls = DrawGuard("refuse"), []
    guard.run(lambda: None, 0)
    inside(all_of_numpy=lambda: pytest.fail("all of NumPy's state was copied"))
    sys.setprofile(lambda frame, event, _: calls.append(event) if event in ("call", "c_call") else None)
    try:
        guard.run(lambda: None, 0)
    finally:
        sys.setprofile(None)
    assert 0 < len(calls) <= 40

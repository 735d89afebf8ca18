"""Random state: nothing of the user's is advanced, and a model's own draws are refused or replayed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Generator

from curvalg.errors import ProblemError

T = TypeVar("T")
Randomness = Literal["refuse", "frozen"]


def _device_generators(device: torch.device) -> list[Generator]:
    """The generators that layers on this device draw from."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    return generators


class DrawGuard:
    """Runs model calls so that they either draw no random numbers, or the same ones each time.

    Args:
        mode: "refuse" raises when a call draws; "frozen" seeds each call by its key and restores the state.
        device: where the model computes.
    """

    def __init__(self, mode: Randomness, device: torch.device) -> None:
        if mode not in ("refuse", "frozen"):
            raise ProblemError(f"randomness is 'refuse' or 'frozen', got {mode!r}")
        self.mode = mode
        self.device = device

    def run(self, call: Callable[[], T], key: int) -> T:
        """The result of a call, with the random state left as it was.

        Raises:
            ProblemError: the call draws random numbers and the mode is "refuse".
        """
        generators = _device_generators(self.device)
        before = [generator.get_state() for generator in generators]
        try:
            if self.mode == "frozen":
                for generator in generators:
                    generator.manual_seed(key)
            result = call()
            after = [generator.get_state() for generator in generators]
        finally:
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)
        if self.mode == "refuse" and not all(map(torch.equal, before, after)):
            raise ProblemError(
                "the model draws random numbers (dropout in training mode?), so every product would be of another matrix. "
                "Call model.eval(), or pass randomness='frozen' to replay the same draws in every product"
            )
        return result


def _global_state() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _set_global_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])


class LoaderStream:
    """The random numbers that a data loader draws, kept apart from the user's.

    A loader draws from the global generators (order, augmentation, worker seeds). Each step of it runs on a stream of
    its own, which goes on from pass to pass, and the user's state is put back after every step.
    """

    def __init__(self) -> None:
        self._state: tuple[Any, ...] | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run one step of the loader on its own stream."""
        user = _global_state()
        if self._state is not None:
            _set_global_state(self._state)
        try:
            yield
        finally:
            self._state = _global_state()
            _set_global_state(user)


def own_generators(loader: Any) -> list[Generator]:
    """Generator objects of the user's that a data loader advances."""
    sampler = getattr(loader, "sampler", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    owners = (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, Generator)}.values())

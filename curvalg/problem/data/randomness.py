"""Random state: the user's generators are not advanced, and a model's own draws are refused or replayed."""

from __future__ import annotations

import ctypes
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor

from curvalg.errors import ProblemError
from curvalg.problem.data.process import LOCK

T = TypeVar("T")
Randomness = Literal["refuse", "frozen"]


class _NumPyState:
    """NumPy's global random state, read cheaply.

    ``np.random.get_state`` takes tens of microseconds, as long as a small model. Where the state in memory has not moved
    since it was last read in full, a comparison of that memory does.
    """

    def __init__(self) -> None:
        self._memory: bytes | None = None
        self._full: dict[str, Any] = {}

    def save(self, *, exactly: bool) -> tuple[bytes | None, dict[str, Any]]:
        """Save the state as it is now; ``exactly`` reads all of it."""
        memory = _numpy_memory()
        # A second number of a normal pair waits outside of that memory, and goes without a trace in it.
        if exactly or memory is None or memory != self._memory or self._full.get("has_gauss"):
            self._memory, self._full = memory, _numpy_full()
        return memory, self._full

    def restore(self, saved: tuple[bytes | None, dict[str, Any]], *, exactly: bool) -> bool:
        """Go back to a saved state; whether anything had been drawn since, which ``exactly`` does not ask."""
        memory, full = saved
        if exactly:
            moved = True
        elif memory is None or full["has_gauss"]:
            moved = pickle.dumps(_numpy_full()) != pickle.dumps(full)
        else:
            moved = _numpy_memory() != memory
        if moved:
            np.random.set_state(full)
        return moved


def _numpy_full() -> dict[str, Any]:
    return np.random.get_state(legacy=False)


def _seed_numpy(key: int) -> None:
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(generator) is np.random.MT19937:
        np.random.seed(key)
    else:  # np.random.seed refuses all others
        fresh = type(generator)(key).state
        np.random.set_state({**fresh, "has_gauss": 0, "gauss": 0.0})


def _numpy_memory() -> bytes | None:
    """Key and position of the Mersenne twister; None for other generators, whose state is behind pointers."""
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(generator) is not np.random.MT19937:
        return None
    return ctypes.string_at(generator.ctypes.state_address, _TWISTER_BYTES)


_TWISTER_BYTES = 624 * 4 + 4


Place = tuple[()] | tuple[int]
"""Which of the devices, as arguments: none where there is only one."""


class AcceleratorState:
    """The random state of all devices of the accelerator, as it is when this is made; empty where none was used yet.

    Asking a device that was not used yet would make it start, which takes long and much memory.
    """

    def __init__(self) -> None:
        self._module = _started()
        self._states: list[tuple[Place, Tensor]] = []
        if self._module is not None:
            count = self._module.device_count()
            places: list[Place] = [(i,) for i in range(count)] if count > 1 else [()]
            self._states = [(place, self._module.get_rng_state(*place)) for place in places]

    def seed(self, key: int) -> None:
        """Start all its generators from a seed."""
        if self._module is not None:
            seed = getattr(self._module, "manual_seed_all", None) or self._module.manual_seed
            seed(key)

    def restore(self) -> bool:
        """Go back to the state; whether anything had been drawn since."""
        moved = [
            (state, *place)
            for place, state in self._states
            if not torch.equal(self._module.get_rng_state(*place), state)
        ]
        for state in moved:
            self._module.set_rng_state(*state)
        return bool(moved)


def _started() -> Any:
    """Torch's module for the accelerator of this process, if there is one and it was used."""
    device = torch.accelerator.current_accelerator()
    if device is None:
        return None
    module = torch.get_device_module(device)
    # MPS does not say whether it was used, and costs nothing to ask.
    started = getattr(module, "is_initialized", None) or module.is_available
    return module if started() else None


class DrawGuard:
    """Runs calls of the user's code so that they either draw no random numbers, or the same ones each time.

    Watched are the generators of torch on the CPU and on every device in use, Python's ``random`` and NumPy's global state.

    Args:
        mode: "refuse" raises when a call draws; "frozen" seeds each call by its key and restores the state.
    """

    def __init__(self, mode: Randomness) -> None:
        if mode not in ("refuse", "frozen"):
            raise ProblemError(f"randomness is 'refuse' or 'frozen', got {mode!r}")
        self.mode = mode
        self._numpy = _NumPyState()

    def run(self, call: Callable[[], T], key: int) -> T:
        """The result of a call, with the random state left as it was.

        Raises:
            ProblemError: the call draws random numbers and the mode is "refuse".
        """
        with LOCK:
            return self._run(call, key)

    def _run(self, call: Callable[[], T], key: int) -> T:
        frozen = self.mode == "frozen"
        host, devices = torch.get_rng_state(), AcceleratorState()
        python = random.getstate()
        numpy = self._numpy.save(exactly=frozen)
        try:
            if frozen:
                torch.default_generator.manual_seed(key)
                devices.seed(key)
                random.seed(key)
                _seed_numpy(key)
            result = call()
        finally:
            drawn = []
            if not torch.equal(torch.get_rng_state(), host):
                torch.set_rng_state(host)
                drawn.append("torch")
            if devices.restore():
                drawn.append("torch on a device")
            if random.getstate() != python:
                random.setstate(python)
                drawn.append("Python's random")
            if self._numpy.restore(numpy, exactly=frozen):
                drawn.append("NumPy")
        if drawn and not frozen:
            raise ProblemError(
                f"the model (or a loss that is a callable) draws random numbers from {' and '.join(drawn)} (dropout in "
                "training mode?), so every product would be of another matrix. Call model.eval(), or pass "
                "randomness='frozen' to replay the same draws in every product. If it draws none, another thread did meanwhile"
            )
        return result


def _global_state() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), _numpy_full(), AcceleratorState()


def _set_global_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])
    state[3].restore()


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
        with LOCK:
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

"""The random state of the accelerator's devices, asked of torch's module for whatever kind it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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

"""The state that an operator was lowered at, and whether the live model still has it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from curvalg.errors import StaleError


class Snapshot:
    """Private copies of all parameters and buffers of model and loss, selected or not, and the training flags.

    Args:
        state: name -> live tensor.
        flags: training flags.
    """

    def __init__(self, state: Mapping[str, Tensor], flags: tuple[bool, ...]) -> None:
        copies: dict[int, Tensor] = {}
        with torch.inference_mode(False):  # copies made under the caller's inference_mode would have no derivatives
            for t in state.values():
                if id(t) not in copies:
                    copies[id(t)] = t.detach().clone()
        # Tied tensors stay tied: one copy for all their names.
        self.state: dict[str, Tensor] = {name: copies[id(t)] for name, t in state.items()}
        self.flags = flags

    def changed(self, state: Mapping[str, Tensor], flags: tuple[bool, ...]) -> list[str]:
        """Names whose live tensors differ now, bit for bit; "training flags" where those do.

        A fused optimiser step changes neither a version counter nor a pointer, so only the bits tell.
        """
        if state.keys() != self.state.keys():
            return sorted(state.keys() ^ self.state.keys())
        seen: dict[int, bool] = {}
        differing = []
        for name, live in state.items():
            if id(live) not in seen:
                seen[id(live)] = _same_bits(live.detach(), self.state[name])
            if not seen[id(live)]:
                differing.append(name)
        return differing if flags == self.flags else [*differing, "training flags"]

    def check(self, state: Mapping[str, Tensor], flags: tuple[bool, ...]) -> None:
        """Raises:
        StaleError: the live model differs from this snapshot.
        """
        if names := self.changed(state, flags):
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise StaleError(
                f"the model changed after the operator was lowered ({shown}); call operator.refresh() to go on at the new "
                "state, or lower the expression again"
            )


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if a.dtype.is_complex:
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    if a.dtype.is_floating_point:
        # As integers NaN equals itself; torch.equal on floats says it does not.
        bits = _BITS[a.element_size()]
        a, b = a.view(bits), b.view(bits)
    return torch.equal(a, b)

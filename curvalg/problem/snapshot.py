"""The state that an operator was lowered at, and whether the live model still has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvalg.errors import StaleError

Slot = tuple[str, Mapping[str, Any], str]
"""A place that holds a tensor: its name, the dict that owns it, the key in that dict."""


class Snapshot:
    """Private copies of all parameters and buffers of model and loss, selected or not, and the training flags.

    Args:
        slots: where the live tensors are.
        modules: modules whose structure and training flags belong to the state.
    """

    def __init__(self, slots: Sequence[Slot], modules: Sequence[nn.Module]) -> None:
        copies: dict[int, Tensor] = {}
        with torch.inference_mode(False):  # copies made under the caller's inference_mode would have no derivatives
            for _, owner, key in slots:
                if id(owner[key]) not in copies:
                    copies[id(owner[key])] = owner[key].detach().clone()
        # Tied tensors stay tied: one copy for all their names.
        self.state: dict[str, Tensor] = {name: copies[id(owner[key])] for name, owner, key in slots}
        # Comparing happens in every product: everything that can be looked up beforehand is.
        once = {id(owner[key]): (name, owner, key) for name, owner, key in reversed(slots)}
        self._watched = [_Watched(owner, key, _bits(self.state[name])) for name, owner, key in once.values()]
        self._modules = [(m, m.training, tuple(m._modules.values())) for m in modules]
        self._ids = {name: id(owner[key]) for name, owner, key in slots}

    def changed(self, slots: Sequence[Slot], modules: Sequence[nn.Module]) -> list[str]:
        """Names whose live tensors differ now, bit for bit; "training flags" and "modules" where those do.

        A fused optimiser step changes neither a version counter nor a pointer, so only the bits tell.
        """
        live = {name: owner[key] for name, owner, key in slots}
        names = sorted(live.keys() ^ self.state.keys())
        names += [n for n, t in live.items() if n in self.state and not _same_bits(t.detach(), _bits(self.state[n]))]
        if [m.training for m in modules] != [training for _, training, _ in self._modules]:
            names.append("training flags")
        return names

    def intact(self) -> bool:
        """Whether nothing that is watched changed; a fast form of :meth:`changed` that does not say what."""
        for module, training, children in self._modules:
            if module.training is not training or tuple(module._modules.values()) != children:
                return False
        return all(watched.intact() for watched in self._watched)

    def check(self, slots: Sequence[Slot], modules: Sequence[nn.Module]) -> None:
        """Raises:
        StaleError: the live model differs from this snapshot.
        """
        names = self.changed(slots, modules)
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        if names:
            raise StaleError(
                f"the model changed after the operator was lowered ({shown}); call operator.refresh() to go on at the new "
                "state, or lower the expression again"
            )


class _Watched:
    """A live tensor, and the bits that it must have.

    Args:
        owner: the dict that holds it.
        key: its place there.
        bits: what they were.
    """

    def __init__(self, owner: Mapping[str, Any], key: str, bits: Tensor) -> None:
        self.owner, self.key, self.bits = owner, key, bits
        self._seen: tuple[Any, ...] | None = None
        self._view = bits

    def intact(self) -> bool:
        """Whether the live tensor has the bits; on small networks every call here is one of a product's."""
        if self.key not in self.owner:  # the dicts of scripted modules have no get
            return False
        live = self.owner[self.key]
        if live is None:
            return False
        # The memory is looked at each time; as long as it is the same memory, through the same view.
        place = (id(live), live.data_ptr(), live.shape, live.stride(), live.dtype)
        if place != self._seen:
            if not _same_bits(live.detach(), self.bits):
                return False
            self._seen, self._view = place, _bits(live.detach())
            return True
        return torch.equal(self._view, self.bits)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(t: Tensor) -> Tensor:
    """The tensor as integers of the same width, so that NaN equals itself."""
    if t.dtype.is_complex:
        t = torch.view_as_real(t.resolve_conj())
    return t.view(_BITS[t.element_size()]) if t.dtype.is_floating_point else t


def _same_bits(live: Tensor, bits: Tensor) -> bool:
    if live.device != bits.device or live.dtype.itemsize != bits.dtype.itemsize * (2 if live.dtype.is_complex else 1):
        return False
    live = _bits(live)
    return live.dtype == bits.dtype and live.shape == bits.shape and torch.equal(live, bits)

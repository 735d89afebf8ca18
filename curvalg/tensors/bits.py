"""Tensors compared bit for bit: a fused optimiser step changes neither a version counter nor a pointer."""

from __future__ import annotations

import torch
from torch import Tensor

from curvalg.tensors.distributed import is_part


class Bits:
    """A private copy of a tensor, and whether a live one has the same bits.

    Args:
        tensor: to copy.
        copy: the copy, where there is one already.
    """

    def __init__(self, tensor: Tensor, copy: Tensor | None = None) -> None:
        with torch.inference_mode(False):
            self.copy = tensor.detach().clone() if copy is None else copy
        self._bits = as_integers(self.copy)
        self._seen: tuple[object, ...] | None = None
        self._view = self._bits

    def intact(self, live: Tensor) -> bool:
        """Whether the live tensor still has the bits; on small networks every call here costs a part of a product's time."""
        # The memory is looked at each time; as long as it is the same memory, through the same view.
        place = (id(live), live.data_ptr(), live.shape, live.stride(), live.dtype)
        if place != self._seen:
            if not self.equal(live):
                return False
            self._seen, self._view = place, as_integers(live.detach())
            return True
        return torch.equal(self._view, self._bits)

    def equal(self, live: Tensor) -> bool:
        """Whether device, dtype, shape and bits are the same; NaN equals itself."""
        if live.device != self.copy.device or live.dtype != self.copy.dtype or live.shape != self.copy.shape:
            return False
        if is_part(live):  # which does not compare with whole tensors
            return False
        return torch.equal(as_integers(live.detach()), self._bits)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(t: Tensor) -> Tensor:
    """The tensor as integers of the same width."""
    if t.dtype.is_complex:
        t = torch.view_as_real(t.resolve_conj())
    return t.view(_INTEGERS[t.element_size()]) if t.dtype.is_floating_point else t


class SampledBits:
    """Some elements of a tensor, and whether they are still the same: for data, of which no copy is kept.

    Version counters miss writes through NumPy and ``.data``; those reach many elements, as a rule.

    Args:
        tensor: of which all elements are taken where there are few, and evenly spread ones of all others.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._memory, self._live = tensor.data_ptr(), as_integers(self._taken())
        self._bits = self._live.clone()

    def intact(self) -> bool:
        """Whether these elements have the same bits."""
        if self.tensor.data_ptr() != self._memory:
            live = as_integers(self._taken())
            if live.shape != self._bits.shape or live.dtype != self._bits.dtype:
                return False
            self._memory, self._live = self.tensor.data_ptr(), live
        return torch.equal(self._live, self._bits)

    def _taken(self) -> Tensor:
        tensor = self.tensor.detach()
        step = -(-tensor.numel() // SAMPLED)
        if step <= 1:
            return tensor
        return tensor.view(-1)[::step] if tensor.is_contiguous() else tensor[::step]


SAMPLED = 4096
"""Elements of a tensor of data that are compared in every product."""

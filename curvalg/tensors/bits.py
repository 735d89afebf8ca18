"""Bits of tensors: compared, as a fused optimiser step changes neither a version counter nor a pointer; hashed; and finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from curvalg.tensors.partial_tensors import is_part


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
        place = where(live)
        if place != self._seen:
            if not self.equal(live):
                return False
            self._seen, self._view = place, as_integers(live.detach())
            return True
        return torch.equal(self._view, self._bits)

    def equal(self, live: Tensor) -> bool:
        """Whether device, dtype, shape and bits are the same; NaN equals itself."""
        return self.alike(live) and torch.equal(as_integers(live.detach()), self._bits)

    def alike(self, live: Tensor) -> bool:
        """Whether device, dtype and shape are the same."""
        if live.device != self.copy.device or live.dtype != self.copy.dtype or live.shape != self.copy.shape:
            return False
        return not is_part(live)  # which does not compare with whole tensors


class ManyBits:
    """Tensors compared with their copies, those on a device by a few kernels, whose answer need not be waited for.

    Small ones are laid side by side first, as a kernel for each would take longer than the product of a network of many
    layers; large ones are compared where they lie.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[object, ...]] = []
        self._small: list[tuple[list[Tensor], Tensor]] = []
        self._large: list[tuple[Tensor, Tensor]] = []

    def intact(self, pairs: Iterable[tuple[Tensor, Bits]], unread: list[Tensor] | None) -> bool:
        """Whether all tensors have the bits of their copies, as far as the host can know without waiting for a device.

        Args:
            pairs: (live tensor, its former bits).
            unread: takes flags of what lies on a device, set where bits changed; None: wait for all.
        """
        if unread is None:
            return all(bits.intact(live) for live, bits in pairs)
        on_device = []
        for live, bits in pairs:
            if live.device.type != "cpu":
                on_device.append((live, bits))
            elif not bits.intact(live):
                return False
        flags = self._differ(on_device) if on_device else []
        unread.extend(flags or ())
        return flags is not None

    def _differ(self, pairs: Sequence[tuple[Tensor, Bits]]) -> list[Tensor] | None:
        """Flags on the device; None where a dtype, shape or device differs already."""
        places = [where(live) for live, _ in pairs]
        if places != self._seen:
            if not all(bits.alike(live) for live, bits in pairs):
                return None
            self._arrange([_flat(as_integers(live.detach()), as_integers(bits.copy)) for live, bits in pairs])
            self._seen = places
        flags = [(torch.cat(lives) != kept).any() for lives, kept in self._small]
        return [*flags, *((live != kept).any() for live, kept in self._large)]

    def _arrange(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        small: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        self._large = []
        for live, kept in pairs:
            if live.ndim == 1 and kept.ndim == 1 and live.nbytes <= SMALL:
                small.setdefault(live.dtype, []).append((live, kept))
            else:
                self._large.append((live, kept))
        self._small = [([live for live, _ in s], torch.cat([kept for _, kept in s])) for s in small.values()]


SMALL = 2**20
"""Bytes up to which a tensor is copied beside others to be compared in one go."""


def where(t: Tensor) -> tuple[object, ...]:
    """The memory of a tensor and the view of it."""
    return (id(t), t.data_ptr(), t.shape, t.stride(), t.dtype)


def _flat(live: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of one shape in the order of memory, each a view; as they are where that is another, or has gaps."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(live.shape, live.stride(), strict=True))
    if live.stride() != kept.stride() or span != live.numel():
        return live, kept
    return live.as_strided((span,), (1,)), kept.as_strided((span,), (1,))


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(t: Tensor) -> Tensor:
    """The tensor as integers of the same width."""
    if t.dtype.is_complex:
        t = torch.view_as_real(t.resolve_conj())
    return t.view(_INTEGERS[t.element_size()]) if t.dtype.is_floating_point else t


def fingerprint(t: Tensor) -> Tensor:
    """A hash of the bits of a tensor, as one integer on its device: of sums, which differ where any number does."""
    bits = as_integers(t.detach().contiguous()).reshape(-1)
    whole = len(bits) * bits.itemsize // 8 * 8 // bits.itemsize
    wide = bits[:whole]
    if wide.storage_offset() * bits.itemsize % 8:
        wide = wide.clone()
    wide = wide.view(torch.int64)  # sums of wide integers need no cast: four times as fast
    half = len(wide) // 2
    parts = [part.sum(dtype=torch.int64) for part in (wide[:half], wide[half:], wide[::3], bits[whole:])]
    return 3 * parts[0] + 5 * parts[1] + 7 * parts[2] + 11 * parts[3]


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


def all_finite(t: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    # The sum is finite where all entries are, and costs no buffer; only if it is not, a closer look is needed.
    return math.isfinite(t.sum().item()) or bool(torch.isfinite(t).all())


def finite_columns(columns: Tensor) -> Tensor:
    """Which columns of (n, K) have no entry that is NaN or infinite (K,)."""
    found: Tensor = (columns * 0).sum(0) == 0  # 0 · ∞ and 0 · NaN are NaN; a sum of finite numbers may overflow
    return found

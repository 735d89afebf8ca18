"""Random test vectors, and their inner products summed in float64."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from curvalg.lowering.vectors import Space
from curvalg.solve.orthogonal import grown, smalls
from curvalg.tensors.long_vectors import lengths, parts, vacant
from curvalg.tensors.memory import wide, widest


@dataclass(frozen=True)
class Probes:
    """Test vectors as rows, E ω ωᵀ = I; number i is a function of (seed, i) alone.

    They are drawn on the CPU in float32, so that a seed means the same on every device and in every precision.

    Args:
        space: that they are in.
        seed: of all of them.
        kind: "sphere", uniform on the sphere of radius √n; or "signs", whose squares are all one, which suits diagonals. Signs
            give the trace of a diagonal matrix without error, by accident: never test an estimator on one.
        keep: whether they are needed again; if not, they take no memory.
    """

    space: Space
    seed: int
    kind: Literal["sphere", "signs"] = "sphere"
    keep: bool = field(default=True, compare=False)

    def rows(self, start: int, stop: int, room: int = 0) -> Tensor:
        """The test vectors start ≤ i < stop, shape (stop − start, n); ``room`` is how many there will be in all."""
        if not self.keep:
            return self._drawn(start, stop)
        kept = self._kept
        if len(kept[0]) < stop:
            kept[0] = grown(kept[0], self._drawn(len(kept[0]), stop), max(stop, room))
        return kept[0][start:stop]

    @cached_property
    def _kept(self) -> list[Tensor]:
        return [torch.zeros(0, self.space.size, dtype=self.space.dtype, device=self.space.device)]

    def _drawn(self, start: int, stop: int) -> Tensor:
        rows = vacant(stop - start, self.space.size, torch.empty(0, device="cpu"))
        for i, row in enumerate(rows, start):  # in place: new memory costs more than the numbers
            # Neighbouring seeds of the generator would do, were it not for users who take neighbouring seeds themselves.
            key = hashlib.blake2b(f"{self.seed} {i}".encode(), digest_size=4).digest()
            generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(key, "little"))
            if self.kind == "signs":
                row.random_(0, 2, generator=generator).mul_(2).sub_(1)
            else:
                row.normal_(generator=generator)
        rows = rows.to(self.space.dtype)
        if self.kind == "sphere":
            rows *= (self.space.size**0.5 / lengths(rows).to(rows))[:, None]
        return rows.to(self.space.device)


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of rows (p, n) and (q, n), summed in float64: (p, q) on the CPU."""
    return inners((left, right))[0]


def inners(*pairs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Inner products as of :func:`inner` for several pairs of rows, each of which is read once; by one wait for the device."""
    rows = {id(t): t for pair in pairs for t in pair}
    first = next(iter(rows.values()))
    totals = [torch.zeros(len(p), len(q), dtype=widest(first.device), device=first.device) for p, q in pairs]
    for part in parts(first.shape[1], sum(map(len, rows.values())), first.device):
        taken = {key: wide(t[:, part]) for key, t in rows.items()}
        for total, (p, q) in zip(totals, pairs, strict=True):
            total.addmm_(taken[id(p)], taken[id(q)].T)
    return smalls(*totals)

"""Random test vectors."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from curvalg.lowering.vectors import Space
from curvalg.solve.orthogonal import grown

TOGETHER = 16
"""Vectors whose lengths are summed over processes at a time. So few numbers are added in the order of the processes; of more,
the order depends on how many there are, and a resumed run draws other numbers of vectors at once."""


@dataclass(frozen=True)
class Probes:
    """Test vectors as rows, E ω ωᵀ = I; number i is a function of (seed, i) alone.

    They are drawn on the CPU in float32, so that a seed means the same on every device, in every precision, and on any number
    of processes that share the vectors.

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
        return [torch.zeros(0, self.space.local, dtype=self.space.dtype, device=self.space.device)]

    def _drawn(self, start: int, stop: int) -> Tensor:
        vectors, key = self.space.vectors, f"probes {self.seed}"
        rows = (vectors.signs if self.kind == "signs" else vectors.normals)(key, start, stop).to(self.space.dtype)
        if self.kind == "sphere":
            lengths = torch.cat([vectors.lengths(some) for some in rows.split(TOGETHER)])
            rows *= (vectors.size**0.5 / lengths.to(rows))[:, None]
        return rows.to(self.space.device)

"""A block-diagonal matrix of structured blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvalg.lowering.blocks.rows import RowRanges, by_blocks
from curvalg.lowering.matrices.structure import Eigh, Function, Structure


class Blocks(Structure):
    """Structured blocks on disjoint rows that together are all.

    Args:
        parts: (where it lies, the block).
    """

    def __init__(self, parts: Sequence[tuple[RowRanges, Structure]]) -> None:
        super().__init__(sum(block.size for _, block in parts))
        self.parts = list(parts)
        self._rows = [places for places, _ in self.parts]

    @property
    def inner(self) -> tuple[Structure, ...]:
        return tuple(block for _, block in self.parts)

    def multiply(self, x: Tensor) -> Tensor:
        return by_blocks(self._rows, x, lambda i, part: self.parts[i][1].multiply(part))

    def solve(self, b: Tensor) -> Tensor:
        return by_blocks(self._rows, b, lambda i, part: self.parts[i][1].solve(part))

    def mapped(self, function: Function, name: str) -> Structure | None:
        blocks = [(places, block.mapped(function, name)) for places, block in self.parts]
        known = [(places, block) for places, block in blocks if block is not None]
        return Blocks(known) if len(known) == len(blocks) else None

    def trace(self) -> float | None:
        return _total([block.trace() for _, block in self.parts])

    def logdet(self) -> float | None:
        return _total([block.logdet() for _, block in self.parts])

    def diagonal(self) -> Tensor | None:
        return self._placed([block.diagonal() for _, block in self.parts])

    def inverse_diagonal(self) -> Tensor | None:
        return self._placed([block.inverse_diagonal() for _, block in self.parts])

    def _placed(self, values: Sequence[Tensor | None]) -> Tensor | None:
        """Numbers for the rows of each block, where these lie."""
        known = [part for part in values if part is not None]
        if len(known) < len(values):
            return None
        result = torch.empty(self.size, dtype=known[0].dtype, device=known[0].device)
        for places, part in zip(self._rows, known, strict=True):
            places.put(result, part.to(result.dtype))
        return result

    def eigh(self) -> Eigh | None:
        """Eigenvalues of all blocks with vectors; a block's own rest becomes explicit only where the rests differ."""
        pairs = [(places, block.eigh()) for places, block in self.parts]
        known = [(places, pair) for places, pair in pairs if pair is not None]
        if len(known) < len(pairs):
            return None
        rests = {pair.rest for _, pair in known if pair.multiplicity}
        if len(rests) > 1:
            return None
        values = torch.cat([pair.eigenvalues for _, pair in known])
        owner = torch.cat([torch.full_like(p.eigenvalues, i, dtype=torch.long) for i, (_, p) in enumerate(known)])
        local = torch.cat([torch.arange(len(p.eigenvalues), device=values.device) for _, p in known])
        values, order = values.sort()

        def vectors(chosen: Tensor) -> Tensor:
            chosen = order[chosen]
            result: Tensor | None = None
            for i, (places, pair) in enumerate(known):
                mine = (owner[chosen] == i).nonzero().reshape(-1)
                if not len(mine):
                    continue
                part = pair.vectors(local[chosen[mine]])
                if result is None:
                    result = part.new_zeros(self.size, len(chosen))
                result[places.indices(part.device)[:, None], mine[None]] = part
            return torch.zeros(self.size, 0, device=order.device) if result is None else result

        return Eigh(values, rests.pop() if rests else 0.0, sum(p.multiplicity for _, p in known), vectors)


def _total(parts: Sequence[float | None]) -> float | None:
    total = 0.0
    for part in parts:
        if part is None:
            return None
        total += part
    return total

"""Layers that one process owns whole, of parameters that lie in parts on all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from curvalg.distributed.dealing import owners
from curvalg.problem.model.model import ModuleModel
from curvalg.problem.model.parameters import Layout
from curvalg.problem.model.sharded.parameter_part import ParameterPart
from curvalg.problem.model.sharded.sharded_model import ShardedModel


class Swap(Protocol):
    """What vectors need to travel to the owners of layers and back."""

    def swapped(self, parts: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        """The parts that all processes have for this one, of those that this one has for each."""


class OwnedLayers:
    """Which process owns each layer, and the way of vectors in parts to the owners and back: one exchange each.

    A layer is the parameters that a module has itself. Layers are dealt out by their numbers, the largest first, so that every
    process knows all owners.

    Args:
        pieces: name -> the part of this process; none is cut by tensor parallelism.
        dtype: of vectors.
        rank: of this process.
        ranks: the number of processes.

    Attributes:
        names: of the parameters that each process owns, in the order of the problem.
    """

    def __init__(self, pieces: Mapping[str, ParameterPart], dtype: torch.dtype, rank: int, ranks: int) -> None:
        self._pieces, self._dtype, self._rank, self._ranks = dict(pieces), dtype, rank, ranks
        layers: dict[str, list[str]] = {}
        for name in pieces:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
        sizes = [float(sum(pieces[name].whole.numel() for name in layer)) for layer in layers.values()]
        chosen = {
            name: owner for owner, layer in zip(owners(sizes, ranks), layers.values(), strict=True) for name in layer
        }
        self.names = [tuple(name for name in pieces if chosen[name] == r) for r in range(ranks)]
        starts = _starts([piece.count(rank) for piece in pieces.values()])
        self._here = {name: slice(a, b) for name, a, b in zip(pieces, starts, starts[1:], strict=False)}
        self._index: dict[tuple[str, int], slice | Tensor] = {}

    @property
    def own(self) -> tuple[str, ...]:
        """The names of the parameters that this process owns."""
        return self.names[self._rank]

    @property
    def forms(self) -> dict[str, Tensor]:
        """Those parameters whole, without numbers."""
        return {name: torch.empty(self._pieces[name].whole, dtype=self._dtype, device="meta") for name in self.own}

    def to_owners(self, x: Tensor, processes: Swap) -> Tensor:
        """Columns over the layers of this process, whole, (m, K), of those in parts (n, K) on all processes."""
        given = [self._joined(x, [self._here[name] for name in names]) for names in self.names]
        counts = [[self._pieces[name].count(rank) for name in self.own] for rank in range(self._ranks)]
        came = processes.swapped(given, [sum(some) for some in counts])
        whole = x.new_empty(sum(self._pieces[name].whole.numel() for name in self.own), x.shape[1])
        for rank, part in enumerate(came):
            for name, rows in zip(self.own, part.split(counts[rank]), strict=True):
                whole[self._rows(name, rank, x.device)] = rows
        return whole

    def from_owners(self, whole: Tensor, processes: Swap) -> Tensor:
        """Columns in parts (n, K) of those over the layers of this process (m, K), and those of the others."""
        given = [
            self._joined(whole, [self._rows(name, rank, whole.device) for name in self.own])
            for rank in range(self._ranks)
        ]
        counts = [[self._pieces[name].count(self._rank) for name in names] for names in self.names]
        came = processes.swapped(given, [sum(some) for some in counts])
        x = whole.new_empty(sum(sum(some) for some in counts), whole.shape[1])
        for owner, part in enumerate(came):
            for name, rows in zip(self.names[owner], part.split(counts[owner]), strict=True):
                x[self._here[name]] = rows
        return x

    @staticmethod
    def _joined(x: Tensor, places: Sequence[slice | Tensor]) -> Tensor:
        return torch.cat([x[at] for at in places]) if places else x[:0]

    def _rows(self, name: str, rank: int, device: torch.device) -> slice | Tensor:
        """Where the numbers of a process lie among those of the layers of this one, in the order in which it holds them."""
        if (name, rank) not in self._index:
            starts = _starts([self._pieces[own].whole.numel() for own in self.own])
            start, runs = starts[self.own.index(name)], replace(self._pieces[name], rank=rank).runs
            found: slice | Tensor
            if len(runs) == 1:
                found = slice(start + runs[0][0], start + sum(runs[0]))
            else:
                each = [torch.arange(start + first, start + first + n, device=device) for first, n in runs]
                found = torch.cat(each) if each else slice(start, start)
            self._index[name, rank] = found
        return self._index[name, rank]


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each of some parts begins that lie one after the other, and where the last one ends."""
    found = [0]
    for size in sizes:
        found.append(found[-1] + size)
    return found


class OwnedModel(ModuleModel):
    """The layers that this process owns, in form alone: what their matrices are laid out by. It is never called.

    Args:
        layers: of all processes.
        like: the model.
    """

    def __init__(self, layers: OwnedLayers, like: ShardedModel) -> None:
        self.__dict__.update(like.__dict__)
        self.chosen = layers.forms

    @property
    def layout(self) -> Layout:
        return Layout(self.chosen)

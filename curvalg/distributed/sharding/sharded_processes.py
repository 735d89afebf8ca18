"""The exchanges of processes that hold parts of the parameters: weights come together before use, and gradients are summed and
cut again."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from curvalg.distributed.packing import packed
from curvalg.distributed.processes import GATHER, SCATTER, SWAP, Processes
from curvalg.distributed.sharding.grid import ProcessGrid

T = TypeVar("T")


@dataclass
class Traffic:
    """What exchanges of one kind amounted to on this rank.

    Attributes:
        calls: how many there were.
        bytes: of all payloads: of a gather what came, of a reduce-scatter what was given.
    """

    calls: int = 0
    bytes: int = 0

    def add(self, payload: Tensor) -> None:
        """Count one more."""
        self.calls += 1
        self.bytes += payload.numel() * payload.itemsize


@dataclass
class TrafficByKind:
    """The exchanges of weights, of gradients, and of numbers of layers with those that own these."""

    gathers: Traffic = field(default_factory=Traffic)
    reduce_scatters: Traffic = field(default_factory=Traffic)
    swaps: Traffic = field(default_factory=Traffic)


class ShardedProcesses(Processes):
    """Ranks that hold parts of the parameters, and of vectors over them.

    Products need no sum over ranks: gradients of the data of all ranks are summed where they are cut into parts. Each exchange
    begins with a frame as any other, so that a rank that fails in the middle of a model call is an error on all.

    Args:
        grid: the processes: those with other data, and all.
        device: where the parameters are.
        lock: held while all do something together.
    """

    sharded = True

    def __init__(self, grid: ProcessGrid, device: torch.device, lock: AbstractContextManager[Any]) -> None:
        super().__init__(grid.data, device, lock, told=grid.whole)
        self.traffic = TrafficByKind()
        self._vectors = Processes(grid.whole, device, lock)

    @property
    def vectors(self) -> Processes:
        """The exchanges of sums over the numbers of vectors, between all processes."""
        return self._vectors

    @contextmanager
    def together(self, what: object) -> Iterator[None]:
        with super().together(what):
            self._vectors._what = self._what
            yield

    def multiplying(self, operand: Tensor) -> None:
        """Nothing is compared: every rank has numbers of its own."""

    def gathered(self, own: Tensor) -> Tensor:
        """The buffers of the ranks of the group, of one length n on all of them: (ranks, n)."""
        self._require_alike([frame[2] for frame in self._frame(GATHER, own.numel())])
        sent = own if self._device_capable else own.cpu()
        every = torch.empty(self.size, sent.numel(), dtype=sent.dtype, device=sent.device)
        gather = (
            getattr(self._dist, "all_gather_single", None) or self._dist.all_gather_into_tensor
        )  # its name before torch 2.13
        self._call(lambda: gather(every.view(-1), sent.contiguous(), group=self._group))
        self._paid(every)
        self.traffic.gathers.add(every)
        return every.to(own.device)

    def scattered(self, parts: Tensor) -> Tensor:
        """The sum over ranks of the part for this rank, (n,), of parts (ranks, n) for each."""
        self._require_alike([frame[2] for frame in self._frame(SCATTER, parts.numel())])
        sent = parts if self._device_capable else parts.cpu()
        own = torch.empty(sent.shape[1], dtype=sent.dtype, device=sent.device)
        scatter = getattr(self._dist, "reduce_scatter_single", None) or self._dist.reduce_scatter_tensor
        self._call(lambda: scatter(own, sent.contiguous().view(-1), group=self._group))
        self._paid(sent)
        self.traffic.reduce_scatters.add(sent)
        return own.to(parts.device)

    def swapped(self, parts: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        """The parts that all ranks have for this one, (rows, K) of each rank, of parts (n, K) for each."""
        columns = parts[0].shape[1]
        self._require_alike([frame[2] for frame in self._frame(SWAP, columns)])
        sent = torch.cat([part.reshape(-1) for part in parts])
        came = self._exchanged(sent, [part.numel() for part in parts], [n * columns for n in rows])
        self.traffic.swaps.add(sent)
        return [part.view(-1, columns) for part in came.split([n * columns for n in rows])]

    def handed_out(self, parts: Sequence[T]) -> list[T]:
        """What each rank has for this one, of structures of tensors that this rank has for each."""
        made = [packed(part) for part in parts]
        sizes = [every[self.rank] for every in self.objects([len(part) for part in made])]
        self._frame(SWAP, 0)
        sent = torch.frombuffer(bytearray(b"".join(made)), dtype=torch.uint8).to(self._host)
        came = self._exchanged(sent, [len(part) for part in made], sizes)
        return [
            torch.load(io.BytesIO(part.cpu().numpy().tobytes()), map_location=self._place, weights_only=False)
            for part in came.split(sizes)
        ]

    def _exchanged(self, sent: Tensor, given: list[int], taken: list[int]) -> Tensor:
        """The numbers from all ranks one after the other, of those for all ranks one after the other."""
        own = sent if self._device_capable else sent.cpu()
        found = torch.empty(sum(taken), dtype=own.dtype, device=own.device)
        self._call(lambda: self._dist.all_to_all_single(found, own.contiguous(), taken, given, group=self._group))
        self._paid(own)
        return found.to(sent.device)

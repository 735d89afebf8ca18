"""Which weights are whole at the moment: those of at most two units."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from curvalg.distributed.sharding.tensor_parallel import Spread
from curvalg.problem.model.sharded.gathering import Exchange, Gather, ReshardUnit
from curvalg.tensors.partial_tensors import is_part

MOST = 2
"""Units that are whole at a time."""


class ShardedCall:
    """One call of the model: whose weights are whole is asked by it, not by numbers, so that all processes decide alike.

    Args:
        parts: of this process, detached.
    """

    def __init__(self, parts: Sequence[tuple[Tensor, ...]]) -> None:
        self.parts = tuple(tuple(part.detach() for part in some) for some in parts)


@dataclass(frozen=True)
class Again:
    """A saved view of a whole weight that is made anew when it is needed: the graph holds this in its place.

    Args:
        unit: the number of the unit.
        index: of the parameter in it.
        call: the call that it was made in.
        size, stride, offset: of the view.
        spread: over the processes of tensor parallelism, or None.
    """

    unit: int
    index: int
    call: ShardedCall
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    spread: Spread | None


@dataclass(frozen=True)
class Wholes:
    """The parameters of one unit, whole.

    Args:
        call: that they are of.
        tensors: the parameters, or the parts of them that tensor parallelism leaves to this process.
        weights: what the model gets.
        graph: whether they have their part in a graph.
    """

    call: ShardedCall
    tensors: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    graph: bool


class WholeWeights:
    """Whole weights of the units in use: the least recently used are dropped, on all processes alike.

    What autograd saves of a whole weight is replaced by a note of where it came from, so that no graph keeps weights whole: on
    the way back they are gathered again.

    Args:
        units: all units.
        spreads: of the parameters of each unit, over the processes of tensor parallelism; None: there is none.
        exchange: with the processes that hold the other parts.
    """

    def __init__(
        self, units: Sequence[ReshardUnit], spreads: Sequence[Sequence[Spread | None]], exchange: Exchange
    ) -> None:
        self.units, self._spreads, self._exchange = units, spreads, exchange
        self.in_use = False
        """Whether they stand in the model at the moment."""
        self._call: ShardedCall | None = None
        self._leaves: Sequence[tuple[Tensor, ...]] = ()
        self._live: OrderedDict[int, Wholes] = OrderedDict()
        self._places: dict[int | None, tuple[weakref.ref[Tensor], int, int, ShardedCall]] = {}
        self._notice: Callable[[Tensor, Tensor], None] | None = None

    @contextmanager
    def noticing(self, notice: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
        """A context in which a function is told of every weight that is made whole, with the part that it is made of."""
        before, self._notice = self._notice, notice
        try:
            yield
        finally:
            self._notice = before

    def begin(self, parts: Sequence[tuple[Tensor, ...]]) -> None:
        """Take the parts of this process by unit, which the next call of the model is of."""
        self.end()
        self._call, self._leaves = ShardedCall(parts), parts

    def end(self) -> None:
        """Forget all that is whole."""
        self._call, self._leaves = None, ()
        self._live.clear()
        self._places.clear()

    def weight(self, unit: int, index: int) -> Tensor:
        """A whole parameter, for the model; in a graph where gradients are on."""
        call, known = self._call, self._live.get(unit)
        assert call is not None
        if known is None or known.call is not call or (torch.is_grad_enabled() and not known.graph):
            known = self._gathered(unit, call, self._leaves[unit])
        self._live.move_to_end(unit)
        return known.weights[index]

    def _gathered(self, unit: int, call: ShardedCall, parts: tuple[Tensor, ...]) -> Wholes:
        self._live.pop(unit, None)
        while len(self._live) >= MOST:
            self._live.popitem(last=False)
        together, pieces = self.units[unit].cut, self.units[unit].pieces
        tensors: tuple[Tensor, ...]
        if together and torch.is_grad_enabled():
            tensors = Gather.apply(self.units[unit], self._exchange, *parts)
        elif together:  # on the way back, where columns may be batched, which such a function forbids
            tensors = self.units[unit].whole(self._exchange, parts)
        else:
            tensors = tuple(part.to(piece.dtype_of(part)) for piece, part in zip(pieces, parts, strict=True))
        weights = [t if s is None else s.of(t) for t, s in zip(tensors, self._spreads[unit], strict=True)]
        self._live[unit] = Wholes(call, tensors, tuple(weights), torch.is_grad_enabled())
        for index, whole in enumerate(tensors if together else ()):
            self._places[self.address(whole)] = (weakref.ref(whole), unit, index, call)
        if self._notice is not None:
            for part, weight in zip(parts, weights, strict=True):
                self._notice(part, weight)
        return self._live[unit]

    def address(self, t: Tensor) -> int | None:
        """What the memory of a tensor is known by; None where it has none."""
        if type(t) not in (Tensor, torch.nn.Parameter) or t.layout != torch.strided:
            return None
        return t.untyped_storage().data_ptr()

    def pack(self, t: Tensor) -> Tensor | Again:
        """What the graph keeps of a tensor."""
        own, spread = t, None
        if is_part(t):
            with torch.no_grad():
                own = t.to_local()  # type: ignore[attr-defined]
            spread = Spread.like(t)
        address = self.address(own)
        place = None if address is None else self._places.get(address)
        if place is None or place[0]() is None:  # other numbers may lie there by now
            return t
        _, unit, index, call = place
        return Again(unit, index, call, own.size(), own.stride(), int(own.storage_offset()), spread)

    def unpack(self, kept: Tensor | Again) -> Tensor:
        """The tensor that a backward pass needs."""
        if isinstance(kept, Tensor):
            return kept
        known = self._live.get(kept.unit)
        if known is None or known.call is not kept.call:
            with torch.no_grad():
                known = self._gathered(kept.unit, kept.call, kept.call.parts[kept.unit])
        self._live.move_to_end(kept.unit)
        view = known.tensors[kept.index].detach().as_strided(kept.size, kept.stride, kept.offset)
        return view if kept.spread is None else kept.spread.of(view)

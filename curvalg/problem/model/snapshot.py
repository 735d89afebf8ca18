"""The state that numbers are computed at, and the comparison with the live model, loss and data."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from curvalg.errors import StaleError
from curvalg.losses import Loss
from curvalg.problem.data.totals import Totals
from curvalg.problem.model.side_effects import SideEffects
from curvalg.problem.model.watch import Watch
from curvalg.tensors.bits import Bits, ManyBits, fingerprint

Slot = tuple[str, Mapping[str, Any], str]
"""A place that holds a tensor: its name, the dict that owns it, the key in that dict."""


class Findings:
    """What was found out of a model and its loss at one structure, whatever the data.

    Attributes:
        sworn: what has been verified.
        curved: operations whose second derivatives have been verified.
        notes: what could not be verified, and why, by topic.
        differentiates: whether the model takes derivatives in its forward, which fails without gradients.
        epsilon: the largest rounding error among the dtypes that the model computes in, once a graph has shown them.
        work: numbers that an operation of the model gives for a batch, in the mean, once a graph has shown them.
    """

    def __init__(self) -> None:
        self.sworn: set[str] = set()
        self.curved: frozenset[str] = frozenset()
        self.notes: dict[str, str] = {}
        self.differentiates = False
        self.epsilon: float | None = None
        self.work: float | None = None


class Configuration:
    """All of a state but the numbers in parameters and buffers: attributes, hooks, submodules, flags, the loss, the data.

    What is counted on the whole data set belongs to it.

    Args:
        modules: the modules of the model, by name.
        others: (name, object) of what else the numbers depend on: the user's loss and functions.
        source: the batches, or what gives them.
        loss: what the user's loss means now.
        refreshes: how often the problem was refreshed before.
    """

    def __init__(
        self,
        modules: Sequence[tuple[str, nn.Module]],
        others: Sequence[tuple[str, Any]],
        source: Any,
        loss: Loss | None,
        refreshes: int,
    ) -> None:
        own = [module for _, module in modules]
        self._names = [name for name, _ in modules[1:]]  # the first is the model, which has none
        self.settings = Watch([(f"attribute of {name}", m) for name, m in modules], exactly=True, modules=own)
        self.functions = Watch(others, exactly=True, modules=own)
        self.data = Watch([("data", getattr(source, "dataset", source))], exactly=False, inside=(Dataset,))
        self._flags = [(m, m.training, tuple(m._modules.values())) for m in own]
        self.loss = loss
        self.refreshes = refreshes
        self.totals: Totals | None = None
        self.found = Findings()
        self.effects = SideEffects(self.settings, self.functions, own)
        self._read = False

    def intact(self, unread: list[Tensor] | None = None) -> bool:
        """Whether everything is as it was; ``unread`` takes flags of what lies on a device, as in :meth:`Snapshot.intact`."""
        for module, training, children in self._flags:
            if module.training is not training or tuple(module._modules.values()) != children:
                return False
        return all(watch.intact(unread) for watch in (self.settings, self.functions, self.data))

    @property
    def training(self) -> int:
        """The training flags of all modules, as one number."""
        return sum(1 << (number % 60) for number, (_, training, _) in enumerate(self._flags) if training)

    @property
    def submodules(self) -> int:
        """A hash of the names of all submodules, the same in every process."""
        return int.from_bytes(hashlib.blake2b("\n".join(self._names).encode(), digest_size=7).digest(), "big")

    def has_read(self) -> None:
        """Note that the data were read to the end: what that changed of them (a cache that a data set fills) does not count."""
        if not self._read:
            self._read = True
            self.data.forgive()

    def changed(self) -> list[str]:
        """Names of what is different now."""
        names = [*self.settings.changed(), *self.functions.changed(), *self.data.changed()]
        if any(module.training is not training for module, training, _ in self._flags):
            names.append("training flags")
        if any(tuple(module._modules.values()) != children for module, _, children in self._flags):
            names.append("submodules")
        return names


class Snapshot:
    """Private copies of all parameters and buffers, selected or not, at a structure.

    Args:
        structure: all else that makes up the state.
        slots: where the live tensors are.
        lock: the problem's.
    """

    def __init__(self, structure: Configuration, slots: Sequence[Slot], lock: AbstractContextManager[Any]) -> None:
        self.structure = structure
        self.lock = lock
        """Held while what is kept at the state is made, changed or multiplied: by one thread at a time."""
        once = {id(owner[key]): Bits(owner[key]) for _, owner, key in reversed(slots)}
        # Tied tensors stay tied: one copy for all their names.
        self.state: dict[str, Tensor] = {name: once[id(owner[key])].copy for name, owner, key in slots}
        # Comparing happens in every product: everything that can be looked up beforehand is.
        places = {id(owner[key]): (owner, key, once[id(owner[key])]) for _, owner, key in reversed(slots)}
        self._watched = list(places.values())
        self._together = ManyBits()
        self.sworn: dict[Any, tuple[str | None, frozenset[str]]] = {}
        """Routes, for which parameters -> why each must not be used at this state (None where it was found right), and the
        operations that it was verified on."""
        self.settled: set[int] = set()
        """Numbers of batches, of data that stay the same, whose outputs and targets were looked at and found allowed."""
        self.restrictions: dict[tuple[str, ...], Any] = {}
        """The problem over some of its parameters, at this state."""

    def on(self, structure: Configuration, lock: AbstractContextManager[Any]) -> Snapshot:
        """The same parameters and buffers, the copies shared, at another structure of the same model, such as on other data."""
        twin = copy.copy(self)
        twin.structure, twin.lock, twin._together = structure, lock, ManyBits()
        twin.sworn, twin.settled, twin.restrictions = {}, set(), {}
        return twin

    def moved(self, values: Mapping[str, Tensor]) -> Snapshot:
        """The state with other values of some tensors, by name; names of one tensor keep one value. Nothing live moves.

        It is to compute at, not to be compared with the live model.
        """
        instead = {id(self.state[name]): value for name, value in values.items()}
        twin = copy.copy(self)
        twin.state = {name: instead.get(id(t), t) for name, t in self.state.items()}
        twin.restrictions = {}
        return twin

    def intact(self, unread: list[Tensor] | None = None) -> bool:
        """Whether nothing that is watched changed; a fast form of :meth:`changed` that does not say what.

        Args:
            unread: takes flags of what lies on a device, set where it changed, so that nothing waits for them here.
        """
        # The dicts of scripted modules have no get().
        if any(key not in owner or owner[key] is None for owner, key, _ in self._watched):
            return False
        live = ((owner[key], bits) for owner, key, bits in self._watched)
        return self._together.intact(live, unread) and self.structure.intact(unread)

    def changed(self, slots: Sequence[Slot]) -> list[str]:
        """Names of what differs now, tensors bit for bit."""
        live = {name: owner[key] for name, owner, key in slots}
        names = sorted(live.keys() ^ self.state.keys())
        names += [n for n, t in live.items() if n in self.state and not Bits(t, self.state[n]).equal(t)]
        return [*names, *self.structure.changed()]

    def digests(self, loss: Loss | None, divided: frozenset[str]) -> dict[str, int]:
        """Hashes of all that the processes that share a problem must have in common, by name.

        Args:
            loss: of the problem.
            divided: names of what each process has a part of.
        """
        tensors = {
            **{name: t for name, t in self.state.items() if name not in divided},
            **{f"loss.{name}": t for name, t in (loss.tensors() if loss is not None else {}).items()},
        }
        found = {name: int(fingerprint(t)) for name, t in tensors.items()}
        return {**found, "training flags": self.structure.training, "names of submodules": self.structure.submodules}

    def stale(self, slots: Callable[[], Sequence[Slot]]) -> StaleError:
        """The error to raise when the state is not intact."""
        names = self.changed(slots())
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return StaleError(
            f"the model, loss or data changed after the operator was lowered ({shown or 'another device'}); call "
            "operator.refresh() to go on at the new state, or lower the expression again"
        )

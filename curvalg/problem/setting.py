"""The ground that evaluations stand on: model, data and loss at one state, options, and kept values."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from curvalg.errors import LossError, ProblemError, StaleError
from curvalg.expr.facts import LossFacts
from curvalg.losses import Loss, resolve_loss
from curvalg.problem.batch import Batch, Layers, Samples
from curvalg.problem.data.batches import Data, ReadBatch
from curvalg.problem.data.process import LOCK
from curvalg.problem.data.randomness import DrawGuard
from curvalg.problem.data.totals import Totals
from curvalg.problem.kept.cache import WORKSPACE, WORKSPACE_SHARE, Budget, Cache
from curvalg.problem.kept.measured import Measured
from curvalg.problem.model import parameters as params_
from curvalg.problem.model.model import Model
from curvalg.problem.model.parameters import Layout
from curvalg.problem.model.snapshot import Configuration, Slot, Snapshot
from curvalg.tensors import trees
from curvalg.tensors.batch_sums import BatchSum
from curvalg.tensors.cuda_graph import SideStream
from curvalg.tensors.memory import workspace

T = TypeVar("T")

OUTPUT_MEMORY, OUTPUT_SHARE = 64 * 2**20, 1 / 32
"""Bytes that outputs may take at a time by default: what suits a host's caches; on a GPU a share of its memory, if more."""


@dataclass(frozen=True)
class Services:
    """Functions that evaluations ask for and only higher folders can give.

    Args:
        count: (setting) -> the totals of the whole data set.
        per_sample: (evaluation, batch) -> the gradients of all shares by parameter.
        layers: (evaluation) -> the recording of the model's layers.
    """

    count: Callable[[Any], Totals]
    per_sample: Callable[[Any, Batch], dict[str, Tensor]]
    layers: Callable[[Any], Layers]


class Setting:
    """A model, data and a loss at one state; :class:`curvalg.Problem` is its face.

    Args:
        model: as a function of its chosen parameters.
        data: the batches.
        loss: the user's loss, with the reduction that was named.
        draws: guards random numbers.
        budget: for what is kept between products.
    """

    services: ClassVar[Services]

    samples: Samples
    factored: Literal["auto"] | bool
    accumulate: torch.dtype | None
    autocast: torch.dtype | None
    compiler: str | None
    verify: bool
    capture: Literal["auto"] | bool
    progress: bool

    def __init__(self, model: Model, data: Data, loss: tuple[Any, Any], draws: DrawGuard, budget: Budget) -> None:
        self.model, self.data, self.draws, self._budget, self._given = model, data, draws, budget, loss
        self.layout = Layout(model.chosen)
        self.device: torch.device = params_.home(model.chosen)
        self.dtype: torch.dtype = self.layout.dtype
        self._kinds = self._find_kinds()
        self._lock = threading.RLock()
        self._side = SideStream(self.device)
        self._refreshes = 0
        self.whole: Self | None = None
        """The problem over all parameters, where this one is over some of them."""
        self.shared: set[Any] = set()
        """Sweeps and factors that several blocks have in common: recorded once for all of them."""
        self.measured = Measured(self.layout.names, self.device)
        self._snapshot: Snapshot | None = None
        self._cached: WeakKeyDictionary[Snapshot, Cache] = WeakKeyDictionary()
        self._structure = self._make_structure()
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("_snapshot", "_cached", "_structure", "_budget", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._snapshot, self._cached = None, WeakKeyDictionary()
        self._lock = threading.RLock()
        self._structure = self._make_structure()

    # -- sizes and facts ------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """The number of chosen parameters, D."""
        return self.layout.size

    @property
    def graphs(self) -> Literal["auto"] | bool:
        """Whether products may be captured as CUDA graphs: as asked for, where there are any."""
        return self.capture if self.device.type == "cuda" else False

    @functools.cached_property
    def most_classes(self) -> int:
        """The most rows of a matrix among the model's tensors: no linear layer has more outputs."""
        return max((owner[key].shape[0] for _, owner, key in self.slots() if owner[key].ndim == 2), default=0)

    @property
    def loss(self) -> Loss | None:
        """The loss that the user means; with its reduction, once the data were counted."""
        structure = self._structure
        return structure.loss if structure.totals is None else structure.totals.loss

    @property
    def facts(self) -> LossFacts | None:
        """The facts of the loss."""
        return None if self.loss is None else self.loss.facts

    @property
    def totals(self) -> Totals:
        """Counts and denominators of the whole data set; the first use at a state reads the data once, without the model
        (with it where the loss is a callable, which is tried on every batch)."""
        with self._lock:
            structure = self._structure
            if structure.totals is None:
                structure.totals = self.services.count(self)
                self.measured.remembered.recall(self.model.given, self._circumstances(structure.totals))
            return structure.totals

    def _circumstances(self, totals: Totals) -> tuple[Hashable, ...]:
        """What measured choices depend on besides the model and what their names say: values alone, which hold no model."""
        source, rule = self.data.source, self.model.rule
        first = source[0] if isinstance(source, (list, tuple)) and source else ()
        shapes = tuple(tuple(t.shape) for t in trees.tensors(first))
        data = (type(source).__name__, shapes, getattr(source, "batch_size", None), self.data.ordered, totals.rows)
        forward = (getattr(rule, "__qualname__", type(rule).__name__), getattr(self.model.given, "training", None))
        options = (
            self.samples,
            self.factored,
            self.accumulate,
            self.autocast,
            self.compiler,
            self.capture,
            self.verify,
        )
        memory = self._budget.limit if self._budget.free is None else "auto"
        place = (str(self.device), tuple(self.layout.dtypes.values()), self.size, torch.get_num_threads())
        return *data, *forward, *options, memory, self.draws.mode, type(totals.loss).__name__, *place

    def need_loss(self) -> Loss:
        """The loss, which must be there.

        Raises:
            LossError: there is none.
        """
        self.totals  # noqa: B018  the reduction of a callable is known only then
        if self.loss is None:
            raise LossError("the problem was made with loss=None; pass a loss to have a value and a gradient")
        return self.loss

    # -- state ----------------------------------------------------------------------------------------------------------

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held while what the problem shares between operators is made or looked up; one thread at a time."""
        return self._lock

    def _make_structure(self) -> Configuration:
        loss, reduction = self._given
        resolved = None if loss is None else resolve_loss(loss, reduction)
        others = [("loss", loss), ("forward", self.model.rule), ("target", self.data.target), *self.model.functions()]
        with LOCK:
            return Configuration(self.model.named_modules(), others, self.data.source, resolved, self._refreshes)

    def _new_structure(self, structure: Configuration | None = None) -> None:
        self.data.forget()
        self._structure = structure or self._make_structure()
        self._forget()

    def _forget(self) -> None:
        """Forget the notes about the model, its layers and outputs; all of them are of one structure."""
        self.model.corrected, self.model.composite = None, False
        self._notes: dict[type, Any] = {}
        self._strict_order = False

    def noted(self, kind: type[T]) -> T:
        """Notes of one part of the code about the model, its layers or outputs, in an object of its own class."""
        if kind not in self._notes:
            self._notes[kind] = kind()
        return self._notes[kind]  # type: ignore[no-any-return]

    def slots(self) -> list[Slot]:
        """The places of every parameter and buffer of the model."""
        return self.model.slots()

    def snapshot(self) -> Snapshot:
        """The state now, the same object as long as nothing that is watched changes."""
        with self._lock, LOCK:
            if self._snapshot is None or not self._snapshot.intact():
                if self._update() or not self._structure.intact():
                    self._new_structure()
                self._snapshot = Snapshot(self._structure, self.slots(), self._lock)
            return self._snapshot

    def _update(self) -> bool:
        """Take the parameters that stand in the model now; whether they are on another device than before."""
        self.model.update()
        self._kinds = self._find_kinds()
        if (device := params_.home(self.model.chosen)) == self.device:
            return False
        self._move(device)
        return True

    def _find_kinds(self) -> tuple[str, ...]:
        """The kinds of devices that the model lies on."""
        kinds = {owner[key].device.type: None for _, owner, key in self.slots()}
        return tuple(kind for kind in kinds if kind != "meta")

    def _move(self, device: torch.device) -> None:
        """Compute on another device from now on: what was measured on the one before holds no longer."""
        self.device = device
        self._side = SideStream(device)
        self.measured = Measured(self.layout.names, device)

    def check(self, snapshot: Snapshot, unread: list[Tensor] | None = None) -> None:
        """Make sure that a state is that of the live model, loss and data.

        Args:
            snapshot: the state.
            unread: takes flags of what lies on a device, so that nothing waits for them here; where one turns out to be set,
                check again without it.

        Raises:
            StaleError: it is not.
        """
        with self._lock, LOCK:
            if snapshot.structure.refreshes != self._refreshes:
                raise StaleError(
                    "the problem was refreshed after the operator was lowered; call operator.refresh() to go on at the new "
                    "state, or lower the expression again"
                )
            if not snapshot.intact(unread):
                raise snapshot.stale(self.slots)
            if snapshot is not self._snapshot:  # something moved and came back, and a state was taken in between
                if snapshot.structure is not self._structure:
                    self._new_structure(snapshot.structure)
                self._update()
                self._snapshot = snapshot

    @property
    def budget(self) -> Budget:
        """The memory that recordings share."""
        return self._budget

    @property
    def workspace(self) -> int:
        """The bytes that a matrix of few directions may take: the budget's or, where nothing is kept, a part of the memory."""
        return self._budget.limit or workspace(self.device, WORKSPACE_SHARE, WORKSPACE)

    @property
    def output_memory(self) -> float:
        """The bytes that outputs may take at a time; setting it holds for what is recorded from then on."""
        given = self._output_memory
        return workspace(self.device, OUTPUT_SHARE, OUTPUT_MEMORY) if given == "auto" else given

    @output_memory.setter
    def output_memory(self, given: Literal["auto"] | float) -> None:
        self._output_memory: Literal["auto"] | float = given

    def cached(self, snapshot: Snapshot) -> Cache:
        """Values kept between products at a snapshot; they live as long as it or until :meth:`Problem.close`."""
        with self._lock:
            if (found := self._cached.get(snapshot)) is None:
                found = self._cached[snapshot] = Cache(self._budget)
            return found

    def release(self) -> None:
        """Drop everything that is kept between products."""
        with self._lock:
            # Emptied first: a restriction shares the snapshot, and with it the list that it is in.
            cached, self._cached = self._cached, WeakKeyDictionary()
            for snapshot in cached:
                for restricted in snapshot.restrictions.values():
                    restricted.release()

    # -- passes over the data -------------------------------------------------------------------------------------------

    def differentiating(self) -> AbstractContextManager[Any]:
        """The context of a product, whatever the caller's: gradients on, inference mode and autocast off.

        The matrix is that of the model in its own dtype; a model that casts inside its forward still does. Where products may
        be captured as CUDA graphs, all runs on a stream of the problem's own.
        """
        if self.graphs:
            return self._beside()
        return self._derivatives()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        with self._side.entered(), self._derivatives():
            yield

    def _derivatives(self) -> AbstractContextManager[Any]:
        autocast = any(torch.is_autocast_enabled(kind) for kind in self._kinds)
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not autocast:
            return nullcontext()  # the usual case; on small networks entering contexts is a tenth of a product
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in self._kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        return stack

    def casting(self) -> AbstractContextManager[Any]:
        """The context of a model call: under autocast if that was asked for."""
        if self.autocast is None:
            return nullcontext()
        stack = ExitStack()
        for kind in self._kinds:
            # Without the cache of cast weights: it outlives the tangents and exchanged parameters of one call.
            stack.enter_context(torch.autocast(kind, self.autocast, cache_enabled=False))
        return stack

    def read(self, order_matters: bool = False) -> Iterator[ReadBatch]:
        """Read the data once, batch by batch, on the problem's device."""
        yield from self.data.read(self.device, self.model.entrance, order_matters=order_matters)
        self._structure.has_read()

    def number_samples(self) -> None:
        """Identify samples by their running number from now on: another order is an error.

        Raises:
            ProblemError: the loader shuffles.
        """
        if not self.data.ordered:
            raise ProblemError(
                "Monte-Carlo draws are fixed by the running number of each sample, but the loader shuffles, so that every "
                "product would be of another matrix. Pass shuffle=False, or list(loader) to fix one pass"
            )
        self._strict_order = True

    def sum(self) -> BatchSum:
        """An empty sum over batches."""
        return BatchSum(self.accumulate)

    # -- some of the parameters -----------------------------------------------------------------------------------------

    def restricted(self, patterns: Sequence[str]) -> Self:
        """The problem over some of its parameters only; shares data, counts and model.

        Raises:
            ProblemError: a pattern that matches none.
        """
        key = tuple(patterns)
        with self._lock:
            snapshot = self._snapshot or self.snapshot()
            if key not in snapshot.restrictions:
                snapshot.restrictions[key] = self._restricted(key, snapshot)
            return snapshot.restrictions[key]  # type: ignore[no-any-return]

    def _restricted(self, patterns: tuple[str, ...], snapshot: Snapshot) -> Self:
        names = params_.match(patterns, self.layout.names)
        # All that is not of the parameters is shared: data, lock, budget, structure, choices.
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.model = copy.copy(self.model)
        twin.model.chosen = {name: self.model.chosen[name] for name in names}
        twin.layout = Layout(twin.model.chosen)
        twin.dtype = twin.layout.dtype
        twin.whole, twin.shared = self, set()
        twin.measured = Measured(names, self.device, like=self.measured)
        twin._snapshot, twin._cached = snapshot, WeakKeyDictionary()
        twin._forget()
        return twin

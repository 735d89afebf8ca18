"""The ground that evaluations stand on: model, data and loss at one state, options, and kept values."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from curvalg.distributed.group import Group
from curvalg.errors import LossError, ProblemError, StaleError
from curvalg.expr.facts import LossFacts
from curvalg.expr.term import Term
from curvalg.losses import Loss, resolve_loss
from curvalg.problem.batch import Batch, Layers, Samples, lazy
from curvalg.problem.data.batches import Data, ReadBatch
from curvalg.problem.data.process import LOCK
from curvalg.problem.data.randomness import DrawGuard
from curvalg.problem.data.totals import Totals
from curvalg.problem.kept.cache import WORKSPACE, WORKSPACE_SHARE, Budget, Cache
from curvalg.problem.kept.circumstances import circumstances
from curvalg.problem.kept.measured import Measured
from curvalg.problem.model import parameters as params_
from curvalg.problem.model.model import Model
from curvalg.problem.model.parameters import Layout
from curvalg.problem.model.precision import autocasting, derivatives
from curvalg.problem.model.same_function import require_same
from curvalg.problem.model.sharded.sharded_sums import sum_of_parts
from curvalg.problem.model.snapshot import Configuration, Slot, Snapshot
from curvalg.tensors.batch_sums import BatchSum
from curvalg.tensors.cuda_graph import SideStream
from curvalg.tensors.memory import workspace
from curvalg.tensors.partial_tensors import PartOfVector
from curvalg.tensors.spaces import VectorSpace

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

OUTPUT_MEMORY, OUTPUT_SHARE = 64 * 2**20, 1 / 32
"""Bytes that outputs may take at a time by default: what suits a host's caches; on a GPU a share of its memory, if more."""


@dataclass(frozen=True)
class Services:
    """Functions that evaluations ask for and only higher folders can give.

    Args:
        count: (setting) -> the totals of the whole data set.
        compare: (setting) -> nothing; raises where the processes that share it compute different things.
        per_sample: (evaluation, batch) -> the gradients of all shares by parameter.
        layers: (evaluation) -> the recording of the model's layers.
    """

    count: Callable[[Any], Totals]
    compare: Callable[[Any], None]
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
    compares: bool
    capture: Literal["auto"] | bool
    progress: bool

    def __init__(self, model: Model, data: Data, loss: tuple[Any, Any], draws: DrawGuard, budget: Budget) -> None:
        self.model, self.data, self.draws, self.budget, self._given = model, data, draws, budget, loss
        self.layout: Layout = model.layout
        self.device: torch.device = params_.home(model.chosen)
        self.dtype: torch.dtype = self.layout.dtype
        self._kinds = self._find_kinds()
        self.lock = threading.RLock()
        """Held while what the problem shares between operators is made or looked up; one thread at a time."""
        self._side = SideStream(self.device)
        self._refreshes = 0
        self.group = Group()
        """The processes that share the problem."""
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
        dropped = ("_snapshot", "_cached", "_structure", "budget", "lock")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._snapshot, self._cached, self.lock = None, WeakKeyDictionary(), threading.RLock()
        self._structure = self._make_structure()

    # -- sizes and facts ------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """The number of chosen parameters, D."""
        return self.layout.size

    @property
    def vectors(self) -> VectorSpace:
        """The space of vectors over the chosen parameters."""
        return self.layout.space(self.group.vectors)

    @property
    def graphs(self) -> Literal["auto"] | bool:
        """Whether products may be captured as CUDA graphs: as asked for, where there are any."""
        return self.capture if self.device.type == "cuda" else False

    @lazy
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
        with self.lock:
            structure = self._structure
            if structure.totals is None:
                with self.together("a pass that counts the data"):
                    structure.totals = self.services.count(self)
                    self.services.compare(self)
                self.measured.remembered.recall(
                    self.model.given, circumstances(self, structure.totals.rows, structure.totals.loss)
                )
            return structure.totals

    def together(self, what: object) -> AbstractContextManager[None]:
        """A context around what all processes that share the problem do together; nothing where there is one."""
        return nullcontext() if self.group.alone else self.group.together(what)

    def need_loss(self) -> Loss:
        """The loss, which must be there.

        Raises:
            LossError: there is none.
        """
        self.totals  # noqa: B018  the reduction of a callable is known only then
        if self.loss is None:
            raise LossError("the problem was made with loss=None; pass a loss to have a value and a gradient")
        return self.loss

    def require_same_function(self, other: Setting, asks: str) -> None:
        """Raise unless the model of another problem computes the same function of the same parameters, as far as can be seen.

        Two problems of one module always do. Of others modules, attributes, flags, hooks, code, buffers and frozen parameters
        are compared; what cannot be compared is named in a warning. Loss, data and ``forward=`` may differ.

        Args:
            other: a problem with the same parameters.
            asks: what the other problem is for, as "influence: queries".

        Raises:
            ProblemError: it computes another function.
        """
        require_same(self.model, other.model, (self.snapshot().state, other.snapshot().state), asks)

    # -- state ----------------------------------------------------------------------------------------------------------

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
        self._factor_columns: dict[Term, int] = {}
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
        with self.lock, LOCK:
            if self._snapshot is None or not self._snapshot.intact():
                if self._update() or not self._structure.intact():
                    self._new_structure()
                self._snapshot = Snapshot(self._structure, self.slots(), self.lock)
            self._compared(self._snapshot)
            return self._snapshot

    def _compared(self, snapshot: Snapshot) -> None:
        """Have the next exchange between processes compare the state."""
        if not self.group.alone:
            self.group.at(snapshot, lambda: snapshot.digests(self.loss, self.model.divided))

    def _update(self) -> bool:
        """Take the parameters that stand in the model now; whether they are on another device than before."""
        with self.group.telling():  # where one is gone, the other processes must not wait for this one
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
        with self.lock, LOCK:
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
        self._compared(snapshot)

    @property
    def workspace(self) -> int:
        """The bytes that a matrix of few directions may take: the budget's or, where nothing is kept, a part of the memory."""
        return self.budget.limit or workspace(self.device, WORKSPACE_SHARE, WORKSPACE)

    @property
    def common_workspace(self) -> float:
        """The least workspace of the processes that share the problem, for what all of them have to do alike."""
        return self.workspace if self.group.alone else self.group.least(self.workspace)

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
        with self.lock:
            if (found := self._cached.get(snapshot)) is None:
                found = self._cached[snapshot] = Cache(self.budget)
            return found

    def release(self) -> None:
        """Drop everything that is kept between products."""
        with self.lock:
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
        return self._beside() if self.graphs or self.group.sharded else self._derivatives()

    @contextmanager
    def _beside(self) -> Iterator[None]:
        with self.model.whole() if self.group.sharded else self._side.entered(), self._derivatives():
            yield

    def _derivatives(self) -> AbstractContextManager[Any]:
        autocast = any(torch.is_autocast_enabled(kind) for kind in self._kinds)
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not autocast:
            return nullcontext()  # the usual case; on small networks entering contexts is a tenth of a product
        return derivatives(self._kinds)

    def casting(self) -> AbstractContextManager[Any]:
        """The context of a model call: under autocast if that was asked for."""
        return nullcontext() if self.autocast is None else autocasting(self._kinds, self.autocast)

    def read(self, order_matters: bool = False) -> Iterator[ReadBatch]:
        """Read the data of this process once, batch by batch, on the problem's device.

        Samples and batches are numbered through all processes, once their numbers are known.
        """
        totals = self._structure.totals
        rows, batches = (0, 0) if totals is None else (totals.rows_before, totals.batches_before)
        for sample in self.data.read(self.device, self.model.entrance, order_matters=order_matters):
            yield sample.after(rows, batches)
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
        """An empty sum over the batches of this process."""
        return BatchSum(self.accumulate)

    def totalled(self, sums: Mapping[K, BatchSum]) -> dict[K, Any]:
        """The sums over the batches of all processes, by one exchange."""
        if self.group.alone:
            return {key: total.value for key, total in sums.items()}
        wide = [total.wide for total in sums.values()]
        if self.group.sharded:
            return dict(zip(sums, sum_of_parts(self.group, wide, self.size), strict=True))
        found = self.group.sum(None if all(value is None for value in wide) else wide) or wide
        return {k: total.rounded(value, self.dtype) for (k, total), value in zip(sums.items(), found, strict=True)}

    def as_part(self, vector: Tensor) -> Tensor:
        """A vector over the parameters; where they are sharded, marked as a part, which is no summand of another sum."""
        return vector.as_subclass(PartOfVector) if self.group.sharded else vector

    # -- other data -----------------------------------------------------------------------------------------------------

    def _twin(self, data: Data, *, lossless: bool = False, whole: bool = False) -> Self:
        """The same model and loss, or none, on other data (maybe all of them), with what is known and a state of its own."""
        state = self.snapshot()
        known = state.structure
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        if lossless:
            twin._given, twin.samples = (None, None), "item"
        twin.data, twin.model = data, copy.copy(self.model)
        if whole:
            twin.group = Group()
        data.may_be_empty = not twin.group.alone
        twin.budget, twin._cached = Budget(0), WeakKeyDictionary()
        twin.lock, twin.shared = threading.RLock(), set()
        twin.measured = Measured(self.layout.names, self.device, like=self.measured)
        twin._structure = twin._make_structure()
        twin._structure.found = copy.deepcopy(known.found) if lossless else known.found
        twin._factor_columns = {}
        twin._snapshot = state.on(twin._structure, twin.lock)
        return twin

    # -- some of the parameters -----------------------------------------------------------------------------------------

    def restricted(self, patterns: Sequence[str]) -> Self:
        """The problem over some of its parameters only; shares data, counts and model.

        Raises:
            ProblemError: a pattern that matches none.
        """
        key = tuple(patterns)
        with self.lock:
            snapshot = self._snapshot or self.snapshot()
            if key not in snapshot.restrictions:
                snapshot.restrictions[key] = self._restricted(key, snapshot)
            return snapshot.restrictions[key]  # type: ignore[no-any-return]

    def _restricted(self, patterns: tuple[str, ...], snapshot: Snapshot) -> Self:
        model = copy.copy(self.model)
        model.chosen = {name: self.model.chosen[name] for name in params_.match(patterns, self.layout.names)}
        return self.over(model, snapshot)

    def over(self, model: Model, snapshot: Snapshot) -> Self:
        """The problem over the chosen parameters of another model, which is this one but for them."""
        # All that is not of the parameters is shared: data, lock, budget, structure, choices.
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.model, twin.layout = model, model.layout
        twin.dtype = twin.layout.dtype
        twin.whole, twin.shared = self, set()
        twin.measured = Measured(twin.layout.names, self.device, like=self.measured)
        twin._snapshot, twin._cached = snapshot, WeakKeyDictionary()
        twin._forget()
        return twin

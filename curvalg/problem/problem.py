"""The problem: a model, a loss, data and parameters, in one object that operators are lowered on."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral, Real
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from curvalg.errors import LossError, ProblemError, StaleError
from curvalg.expr.facts import LossFacts
from curvalg.expr.term import Term
from curvalg.losses import CallableLoss, Loss, LossPoint, resolve_loss
from curvalg.problem.batch import Batch, Samples
from curvalg.problem.data.batches import Data, OrderError, ReadBatch
from curvalg.problem.data.process import LOCK
from curvalg.problem.data.randomness import DrawGuard, Randomness
from curvalg.problem.evaluation import Evaluation
from curvalg.problem.kept.budget import FRACTION, Budget
from curvalg.problem.large_outputs.find_head import is_made_in_chunks
from curvalg.problem.model import parameters as params_
from curvalg.problem.model.model import ModuleModel, differentiable, make_model, recording
from curvalg.problem.model.parameters import Layout
from curvalg.problem.model.precision import accumulating, casting, compiler
from curvalg.problem.state.snapshot import Configuration, Slot, Snapshot
from curvalg.problem.totals import Totals, count
from curvalg.problem.verification.oaths import swear_loss
from curvalg.tensors import trees
from curvalg.tensors.batch_sums import BatchSum
from curvalg.tensors.memory import free_memory

T = TypeVar("T")
WORKSPACE = 2 * 2**30
"""Bytes that a matrix of few directions may take where nothing is to be kept between products."""
DEFAULT_OUTPUT_MEMORY = 64 * 2**20
"""Bytes that outputs may take with ``output_memory="auto"``."""


class Problem:
    """What curvature is about: L(θ) = Σₙ cₙ over a data set.

    Args:
        model: an ``nn.Module``, or a function ``(params: dict, inputs) -> output``.
        loss: a torch loss module, a function of ``torch.nn.functional``, a :class:`~curvalg.losses.Loss`, or any callable
            ``(output, target) -> scalar``; None suffices for the Jacobian.
        data: a tuple ``(X, y)`` (one batch), a list of batches, a DataLoader or any re-iterable of batches.
        params: the parameters: None (all that require gradients), names or glob patterns, or a dict.
        forward: ``forward(model, batch) -> output`` for batches that are neither pairs nor mappings.
        target: ``target(batch)`` for the same.
        reduction: "mean" or "sum", how a callable loss reduces a batch; told from its values where possible. Means of batches
            are put together by their numbers of rows.
        samples: whether one sample is a row of a batch ("item") or an element of the loss ("position", as a token);
            decides gradient covariances.
        randomness: "refuse" random layers in training mode, or "frozen": replay the same draws in every product.
        cache: bytes that recordings kept between products may take; 0 records anew in every product; "auto": a quarter of
            what is free on the device when the problem is made, and nothing that would not fit into what is free then.
            Statistics and explicit matrices are kept in any case.
        columns: how products with several columns are taken: "loop" (one after the other), a number (so many in one
            batched backward pass), or "auto" (whichever is faster, measured once).
        factored: whether products of matrices with few output directions are taken from layer inputs and deltas, or from
            columns multiplied out: "auto" (after some products, if that is faster, measured once), True (from the first on,
            where they can), or False. What is chosen by the clock changes the last bits.
        accumulate: dtype that sums over batches are kept in, as torch.float64; None: that of the products. Results are
            rounded to the dtype of the products in either case.
        autocast: dtype that the model runs in where torch's autocast chooses to, torch.bfloat16 or torch.float16; None: in
            its own. Outputs, loss and products are in float32 then.
        compile: compile the linear programs that tangents J v may be taken by (True, or the name of a backend of
            ``torch.compile``). Compiling takes long; a program is used where it agrees with the recorded graph and is faster.
        output_memory: bytes that outputs may take at a time, with all that a product makes of them, or "auto" (64 MiB).
            Larger outputs of a softmax loss (tokens × vocabulary) are made and dropped chunk by chunk, where the model ends in
            a linear layer; 0 takes one position at a time, ``float("inf")`` always all.
        verify: check each route once before it is believed, on the first batch and on every later one with an operation that
            none before it had: calls against the live model, tangents against gradients, second derivatives against a central
            difference and each other, structured inverses against products of their matrix. Costs a few gradients at the first
            product, and one product with three columns at the first structured solve; False leaves it out.
        progress: show a progress bar for passes over the data.

    A problem is at one state: parameters, buffers, flags, attributes, hooks and submodules of model and loss, the objects of
    your own classes that these hold (and attributes and methods of the classes), variables that their functions close over or
    default to, and the tensors of data in memory. All of these are watched: where one changes, operators raise
    :class:`~curvalg.StaleError` until they are refreshed, and the next ``value()``, ``gradient()`` or lowering takes everything
    anew. What a forward writes itself does not count. Not watched are files behind a loader, global variables, hooks for all
    modules, and writes into single elements of data past autograd (``t.data``, NumPy views: a sample of 4096 elements of each
    tensor on the CPU is compared); after such a change call :meth:`refresh`.

    Several threads may lower and multiply on one problem: what is shared between them is made and multiplied by one at a time.

    Matrix products and convolutions are those that torch is set to: where TF32 is allowed on a GPU
    (``torch.backends.cuda.matmul.allow_tf32``, ``torch.backends.cudnn.allow_tf32``) float32 products carry about three digits,
    for curvature as for gradients. Nothing is changed here; switch it off for more.

    Raises:
        ProblemError: a model, selection, data set or option that cannot be used.
        LossError: a loss that is not supported, by name.

    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> problem = Problem(model, torch.nn.MSELoss(), (torch.randn(5, 3), torch.randn(5, 2)))
    >>> problem
    Problem(Linear, MSE, 8 parameters in 2 tensors, torch.float32 on cpu)
    """

    _budget: Budget
    _columns: Literal["auto", "loop"] | int

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        loss: Any,
        data: Any,
        *,
        params: params_.Selection = None,
        forward: Callable[[Any, Any], Any] | None = None,
        target: Callable[[Any], Any] | None = None,
        reduction: Literal["mean", "sum"] | None = None,
        samples: Samples = "item",
        randomness: Randomness = "refuse",
        cache: Literal["auto"] | int = "auto",
        columns: Literal["auto", "loop"] | int = "auto",
        factored: Literal["auto"] | bool = "auto",
        accumulate: torch.dtype | None = None,
        autocast: torch.dtype | None = None,
        compile: bool | str = False,
        output_memory: Literal["auto"] | float = "auto",
        verify: bool = True,
        progress: bool = False,
    ) -> None:
        with LOCK:  # while another problem calls the same model, other tensors stand in it
            self.model = make_model(model, params, forward)
        self.layout = Layout(self.model.chosen)
        self.device: torch.device = next(iter(self.model.chosen.values())).device
        self.dtype: torch.dtype = self.layout.dtype
        self.data = Data(data, target, needs_target=loss is not None)
        self._given = (loss, reduction)
        self._lock = threading.RLock()
        self._refreshes = 0
        self.whole: Problem | None = None
        """The problem over all parameters, where this one is over some of them."""
        self.shared: set[Any] = set()
        """Sweeps and factors that several blocks have in common: recorded once for all of them."""
        _one_of("verify", verify, (True, False))
        self.verify = bool(verify)
        self._structure = self._make_structure()
        _one_of("samples", samples, ("item", "position"))
        if samples == "position" and self.loss is not None and not self.loss.positions:
            raise LossError(
                f"samples='position' needs a loss that says where its positions are, such as CrossEntropy(class_axis=...) or "
                f"MSE; {self.loss.name} does not. Use samples='item'"
            )
        self.samples: Samples = samples
        self.columns = columns
        _one_of("factored", factored, ("auto", True, False))
        self.factored: Literal["auto"] | bool = "auto" if factored == "auto" else bool(factored)
        self.accumulate = accumulating(accumulate, self.dtype, self.device)
        self.autocast = casting(autocast, self.device)
        self.compiler = compiler(compile)
        self.cache = cache
        self.output_memory = _output_memory(output_memory)
        _one_of("progress", progress, (True, False))
        self.progress = bool(progress)
        self.draws = DrawGuard(randomness, self.device)
        self._reset()

    def _reset(self) -> None:
        # What short measurements chose between ways that give the same numbers up to rounding, by what they are of; and what an
        # earlier run chose, which is not measured again: so that a resumed run gives the same bits.
        self.choices: dict[str, Any] = {}
        self.recalled: dict[str, Any] = {}
        self._snapshot: Snapshot | None = None
        self._kept: WeakKeyDictionary[Snapshot, dict[Any, Any]] = WeakKeyDictionary()
        self._forget()

    def _forget(self) -> None:
        """What was found out about the model, its layers and outputs; all of it is of one structure."""
        self._factor_columns: dict[Term, int] = {}
        self.model.corrected, self.model.composite = None, False
        # Why tangents J v are not taken by these routes.
        self.no_forward_ad: str | None = None
        self.no_double_backward: str | None = None
        self._strict_order = False
        self._writes_inputs: bool | None = None
        # Of large outputs: whether the model ends in a linear layer and why not; weights of layers known not to be the last.
        self.ends_in_head: bool | None = None
        self.no_head: str | None = None
        self.inner_layers: set[str] = set()
        self.per_sample_route: str | None = None
        self.per_sample_notes: list[str] = []
        # Of the layers: parameter -> why its gradients are multiplied out; parameters that share a record; parameter -> rows
        # of the batch that its record was compared on, 2 for any more.
        self.layer_notes: dict[str, str] = {}
        self.layer_batched: bool | None = None
        self.layer_groups: list[tuple[str, ...]] = []
        self.layer_checks: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("_snapshot", "_kept", "_structure", "_budget", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._snapshot, self._kept = None, WeakKeyDictionary()
        self._lock = threading.RLock()
        self._structure = self._make_structure()
        self.cache = self._cache

    @property
    def cache(self) -> Literal["auto"] | int:
        """Bytes that recordings kept between products may take; setting it holds for what is recorded from then on."""
        return self._cache

    @cache.setter
    def cache(self, cache: Literal["auto"] | int) -> None:
        if cache != "auto" and (isinstance(cache, bool) or not isinstance(cache, Integral) or cache < 0):
            raise ProblemError(f"cache is 'auto' or a number of bytes ≥ 0, got {cache!r}")
        self._cache = cache
        free = functools.partial(free_memory, self.device) if cache == "auto" else None
        limit = int(cache) if free is None else int(FRACTION * free())
        if "_budget" in self.__dict__:
            self._budget.resize(limit, free)
        else:
            self._budget = Budget(limit, free)

    @property
    def columns(self) -> Literal["auto", "loop"] | int:
        """How products with several columns are taken; setting it holds for what is recorded from then on."""
        return self._columns

    @columns.setter
    def columns(self, columns: Literal["auto", "loop"] | int) -> None:
        number = isinstance(columns, Integral) and not isinstance(columns, bool) and int(columns) >= 1
        if columns not in ("auto", "loop") and not number:
            raise ProblemError(
                f"columns is 'auto', 'loop' or the number of columns in one backward pass, got {columns!r}"
            )
        self._columns = columns

    @property
    def budget(self) -> Budget:
        """The memory that recordings share."""
        return self._budget

    # -- sizes and facts ------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Number of chosen parameters, D."""
        return self.layout.size

    @functools.cached_property
    def most_classes(self) -> int:
        """The most rows of a matrix among the model's tensors: no linear layer has more outputs."""
        return max((owner[key].shape[0] for _, owner, key in self.slots() if owner[key].ndim == 2), default=0)

    @property
    def loss(self) -> Loss | None:
        """What the user's loss means; with its reduction, once the data were counted."""
        structure = self._structure
        return structure.loss if structure.totals is None else structure.totals.loss

    @property
    def num_samples(self) -> int:
        """N, the number of samples whose share of the loss is not identically zero."""
        self.snapshot()
        return self.totals.count

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
                structure.totals = count(self)
            return structure.totals

    # -- state ----------------------------------------------------------------------------------------------------------

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held while what the problem shares between operators is made or looked up; one thread at a time."""
        return self._lock

    def refresh(self) -> Problem:
        """Take everything as it is now: parameters, buffers, flags, attributes, hooks, submodules, the loss, the data.

        Operators that were lowered before raise :class:`~curvalg.StaleError` until they are refreshed. Whatever is watched
        (see :class:`Problem`) is taken anew without this call as well; it is for what cannot be watched.

        Returns:
            The problem itself.

        >>> import torch
        >>> scale = {"of": 1.0}
        >>> X, y = torch.randn(5, 3), torch.randn(5, 1)
        >>> problem = Problem(torch.nn.Linear(3, 1), torch.nn.MSELoss(), (X, y))
        >>> problem.num_samples, problem.refresh().num_samples
        (5, 5)
        """
        with self._lock:
            self._refreshes += 1
            self._snapshot = None
            self._new_structure()
        return self

    def _make_structure(self) -> Configuration:
        loss, reduction = self._given
        resolved = None if loss is None else resolve_loss(loss, reduction)
        others = [("loss", loss), ("forward", self.model.rule), ("target", self.data.target), *self.model.functions()]
        with LOCK:
            return Configuration(self.model.named_modules(), others, self.data.source, resolved, self._refreshes)

    def _new_structure(self) -> None:
        self.data.forget()
        self._structure = self._make_structure()
        self._forget()

    def slots(self) -> list[Slot]:
        """Where every parameter and buffer of the model is."""
        return self.model.slots()

    def snapshot(self) -> Snapshot:
        """The state now; the same object as long as nothing that is watched changes."""
        with self._lock, LOCK:
            if self._snapshot is None or not self._snapshot.intact():
                if not self._structure.intact():
                    self._new_structure()
                self.model.update()
                self._snapshot = Snapshot(self._structure, self.slots(), self._lock)
            return self._snapshot

    def check(self, snapshot: Snapshot) -> None:
        """Make sure that a state is that of the live model, loss and data.

        Raises:
            StaleError: it is not.
        """
        with self._lock, LOCK:
            if snapshot.structure.refreshes != self._refreshes:
                raise StaleError(
                    "the problem was refreshed after the operator was lowered; call operator.refresh() to go on at the new "
                    "state, or lower the expression again"
                )
            if not snapshot.intact():
                raise snapshot.stale(self.slots)
            if snapshot is not self._snapshot:  # something moved and came back, and a state was taken in between
                if snapshot.structure is not self._structure:
                    self.data.forget()
                    self._structure = snapshot.structure
                    self._forget()
                self.model.update()
                self._snapshot = snapshot

    def kept(self, snapshot: Snapshot) -> dict[Any, Any]:
        """What is kept between products at a snapshot; lives as long as the snapshot or until :meth:`close`."""
        with self._lock:
            return self._kept.setdefault(snapshot, {})

    def close(self) -> None:
        """Release everything that is kept between products."""
        with self._lock:
            for snapshot in self._kept:
                for restricted in snapshot.restrictions.values():
                    restricted.close()
            self._kept.clear()

    # -- evaluation -----------------------------------------------------------------------------------------------------

    def differentiating(self) -> AbstractContextManager[Any]:
        """Where products may be taken; see :func:`curvalg.problem.model.model.differentiable`."""
        return differentiable(self.device)

    def casting(self) -> AbstractContextManager[Any]:
        """Where the model is called: under autocast if that was asked for."""
        if self.autocast is None:
            return nullcontext()
        # Without the cache of cast weights: it outlives the tangents and exchanged parameters of one call.
        return torch.autocast(self.device.type, self.autocast, cache_enabled=False)

    def evaluations(self, snapshot: Snapshot, *, order_matters: bool = False) -> Iterator[Evaluation]:
        """One pass over the data at a snapshot."""
        order_matters = order_matters or self._strict_order or self.draws.mode == "frozen"
        # Which samples share a batch decides the matrix while they influence each other.
        order_matters = order_matters or bool(self.model.batch_statistics)
        samples = tqdm(self.read(order_matters), "batches", leave=False, disable=not self.progress)
        try:
            for sample in samples:
                yield Evaluation(self, snapshot, sample)
        except OrderError as error:
            for name in self.model.batch_statistics:
                raise OrderError(
                    f"the BatchNorm layer {name!r} takes the statistics of each batch, and the loader gives other batches in "
                    "every pass, so that every product would be of another matrix. Call model.eval(), or pass shuffle=False"
                ) from error
            raise

    def read(self, order_matters: bool = False) -> Iterator[ReadBatch]:
        """One pass over the data, batch by batch on the problem's device."""
        yield from self.data.read(self.device, order_matters=order_matters)
        self._structure.has_read()

    @contextmanager
    def batches(self) -> Iterator[Iterator[Batch]]:
        """One pass over the data as terms see it, at the parameters as they are now; batches live inside the context only.

        >>> import torch
        >>> problem = Problem(torch.nn.Linear(3, 2), torch.nn.MSELoss(), (torch.randn(5, 3), torch.randn(5, 2)))
        >>> with problem.batches() as batches:
        ...     shapes = [tuple(batch.output.shape) for batch in batches]
        >>> shapes
        [(5, 2)]
        """
        snapshot = self.snapshot()
        with self.differentiating():
            yield (evaluation.evaluate() for evaluation in self.evaluations(snapshot, order_matters=True))

    def factor_columns(self, term: Term) -> int:
        """How many columns a row has in the factor of a term, told from the first batch by one model call.

        Where outputs are made in chunks there is no factor of a batch; the number is then that of all outputs.
        """
        if self.whole is not None:  # it does not depend on the parameters
            return self.whole.factor_columns(term)
        if term not in self._factor_columns:
            with self.differentiating():
                first = next(iter(self.evaluations(self.snapshot())))
                if is_made_in_chunks(first, term):
                    outputs = self.most_classes * sum(t.numel() for t in trees.tensors(first.sample.target))
                    self._factor_columns[term] = outputs // first.sample.rows
                else:
                    self._factor_columns[term] = term.factor_columns(first.evaluate())
        return self._factor_columns[term]

    def number_samples(self) -> None:
        """From now on samples are told apart by their running number: another order is an error.

        Raises:
            ProblemError: the loader shuffles.
        """
        if not self.data.ordered:
            raise ProblemError(
                "Monte-Carlo draws are fixed by the running number of each sample, but the loader shuffles, so that every "
                "product would be of another matrix. Pass shuffle=False, or list(loader) to fix one pass"
            )
        self._strict_order = True

    @contextmanager
    def guarding_inputs(self, batch: Any) -> Iterator[Any]:
        """A batch that the model may be called on: its tensors, or copies where the model writes into its inputs.

        Raises:
            ProblemError: the model wrote into the inputs although it did not on the first batch.
        """
        if self._writes_inputs is not False:
            batch = trees.tensor_map(torch.clone, batch)
        before = trees.versions(batch)
        yield batch
        written = before != trees.versions(batch)
        if written and self._writes_inputs is False:
            raise ProblemError("the model writes into its inputs in place on some batches; clone them in its forward")
        if self._writes_inputs is None:
            self._writes_inputs = written

    def loss_point(self, output: Any, sample: ReadBatch) -> LossPoint[Any]:
        """The loss at one output; a loss that is the user's code is guarded like the model."""
        loss = self._need_loss()
        if not isinstance(loss, CallableLoss):
            return loss.at(output, sample.target)
        with recording(self.device, self.model):
            point = self.draws.run(lambda: loss.at(output, sample.target), sample.index)
        swear_loss(self, point)
        return point

    def value(self) -> float:
        """L(θ), the loss of the whole data set.

        Raises:
            ProblemError: it is not finite.
        """
        with self._lock:
            snapshot = self.snapshot()
            self._need_loss()
            total = 0.0
            with self.differentiating():
                for evaluation in self.evaluations(snapshot):
                    total += evaluation.value()
            return self._finite(total / self.totals.denominator, math.isfinite(total), "value")

    def gradient(self) -> Tensor:
        """∇L(θ), shape (D,).

        Raises:
            ProblemError: it is not finite.
        """
        with self._lock:
            snapshot = self.snapshot()
            self._need_loss()
            total = self.sum()
            with self.differentiating():
                for evaluation in self.evaluations(snapshot):
                    total.add(evaluation.gradient())
            result: Tensor = total.value
            return self._finite(result, bool(torch.isfinite(result).all()), "gradient")

    @staticmethod
    def _finite(result: T, finite: bool, what: str) -> T:
        if not finite:
            raise ProblemError(
                f"the {what} of the loss is not finite (NaN or infinite); look for targets, weights or outputs that are not "
                "finite"
            )
        return result

    def sum(self) -> BatchSum:
        """An empty sum over batches."""
        return BatchSum(self.accumulate)

    def _need_loss(self) -> Loss:
        self.totals  # noqa: B018  the reduction of a callable is known only then
        if self.loss is None:
            raise LossError("the problem was made with loss=None; pass a loss to have a value and a gradient")
        return self.loss

    def restricted(self, patterns: Sequence[str]) -> Problem:
        """The same problem over some of its parameters only; shares data, counts and model.

        Raises:
            ProblemError: a pattern that matches none.
        """
        key = tuple(patterns)
        with self._lock:
            snapshot = self._snapshot or self.snapshot()
            if key not in snapshot.restrictions:
                snapshot.restrictions[key] = self._restricted(key, snapshot)
            return snapshot.restrictions[key]  # type: ignore[no-any-return]

    def _restricted(self, patterns: tuple[str, ...], snapshot: Snapshot) -> Problem:
        names = params_.match(patterns, self.layout.names)
        # All that is not of the parameters is shared: data, lock, budget, structure, choices.
        twin = object.__new__(Problem)
        twin.__dict__.update(self.__dict__)
        twin.model = copy.copy(self.model)
        twin._reset()
        twin.choices, twin.recalled = self.choices, self.recalled
        twin.model.chosen = {name: self.model.chosen[name] for name in names}
        twin.layout = Layout(twin.model.chosen)
        twin.dtype = twin.layout.dtype
        twin._snapshot, twin.whole, twin.shared = snapshot, self, set()
        return twin

    def known(self, choice: str) -> Any:
        """What was chosen in an earlier run, or at an earlier state of the model; None if nothing was."""
        return self.recalled.get(choice, self.choices.get(choice))

    def choice(self, topic: str, subject: object) -> str:
        """The name of a choice about something on these parameters."""
        names = hashlib.sha256("\n".join(self.layout.names).encode()).hexdigest()[:12]
        return f"{topic} of {subject} over {len(self.layout.names)} tensors ({names})"

    def __repr__(self) -> str:
        model = type(self.model.module).__name__ if isinstance(self.model, ModuleModel) else "function"
        loss = "no loss" if self.loss is None else type(self.loss).__name__
        return (
            f"Problem({model}, {loss}, {self.size} parameters in {len(self.layout.names)} tensors, {self.dtype} on "
            f"{self.device})"
        )


def _one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ProblemError(f"{name} is one of {list(allowed)}, got {value!r}")


def _output_memory(value: Literal["auto"] | float) -> float:
    if value == "auto":
        return DEFAULT_OUTPUT_MEMORY
    if isinstance(value, bool) or not isinstance(value, Real) or not value >= 0:
        raise ProblemError(f"output_memory is 'auto' or a number of bytes ≥ 0, got {value!r}")
    return float(value)


ParameterDict = Mapping[str, Tensor]

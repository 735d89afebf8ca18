"""The problem: a model, a loss, data and parameters, in one object that operators are lowered on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from curvalg.distributed.making import make_group
from curvalg.errors import LossError, OptionError, ProblemError
from curvalg.expr.term import Term
from curvalg.problem.batch import Batch, Samples
from curvalg.problem.data.batches import Data, OrderError, ReadBatch
from curvalg.problem.data.parts_of_data import require_whole_data
from curvalg.problem.data.process import LOCK
from curvalg.problem.data.randomness import DrawGuard, Randomness
from curvalg.problem.evaluation import Evaluation
from curvalg.problem.kept.cache import FRACTION, Budget
from curvalg.problem.large_outputs.find_head import factor_columns
from curvalg.problem.layers.per_sample import per_sample_gradients
from curvalg.problem.layers.recorded import record_layers
from curvalg.problem.model import parameters as params_
from curvalg.problem.model.make_model import Shard, make_model
from curvalg.problem.model.precision import accumulating, casting, compiler
from curvalg.problem.model.sharded.sharded_model import ShardedModel
from curvalg.problem.model.snapshot import Snapshot
from curvalg.problem.passes.count import count
from curvalg.problem.passes.filling import filled
from curvalg.problem.passes.first_order import finite, gradient_over, gradient_rows, loss_of
from curvalg.problem.passes.joining import compare, join
from curvalg.problem.passes.options import one_of, output_bytes, read_for, require_parts, settle_options
from curvalg.problem.passes.shown import PUBLIC, described, problem_card
from curvalg.problem.passes.with_respect_to import MadeOf, with_respect_to
from curvalg.problem.setting import Services, Setting
from curvalg.tensors.bits import all_finite
from curvalg.tensors.memory import free_memory


class Problem(Setting):
    """What curvature is about: L(θ) = Σₙ cₙ over a data set.

    Args:
        model: an ``nn.Module``, or a function ``(params: dict, inputs) -> output``.
        loss: a torch loss module, a function of ``torch.nn.functional``, a :class:`~curvalg.losses.Loss`, or any callable
            ``(output, target) -> scalar`` or ``output -> scalar``; None suffices for the Jacobian.
        data: ``(X, y)`` (one batch), a list of batches, a DataLoader or any re-iterable of them; ``X`` if no target is needed.
        wrt: what is differentiated by: "parameters", or, of one batch, an additive perturbation (zero) of "inputs", or of the
            output of a module, as "activations:layer3", which takes the place of the parameters then.
        params: the parameters: None (all that require gradients), names or glob patterns, parameters of the model themselves
            (``params=model.head.parameters()``), or a dict.
        forward: ``forward(model, batch) -> output`` for batches that are neither pairs nor mappings.
        target: ``target(batch) -> target`` for such batches.
        reduction: "mean" or "sum", how a callable loss reduces a batch; found from its values where possible. Means of batches
            are put together by their numbers of rows.
        samples: what one sample is, which decides gradient covariances: a row of a batch ("item"); a position of a row, as a
            token ("position": all classes there, or the vector along the last axis of outputs (batch, ..., vector) of MSE and
            its kin); or each number of an output of MSE and its kin ("element").
        randomness: "refuse" random layers in training mode, or "frozen": replay the same draws in every product.
        cache: bytes that recordings kept between products may take; 0 records anew in every product; "auto": a quarter of
            what is free on the device when the problem is made, and nothing that would not fit into what is free then.
            Statistics and explicit matrices are kept in any case.
        columns: how products with several columns are taken: "loop" (one after the other), a number (so many in one
            batched backward pass), or "auto" (whichever is faster, measured once).
        factored: whether products of matrices with few output directions are taken from layer inputs and deltas, or from
            columns multiplied out: "auto" (after some products, if that is faster, measured once), True (from the first on,
            where they can), or False. What the clock chooses, here, for columns or for tangents, changes the last bits.
        accumulate: dtype that sums over batches are kept in, as torch.float64; None: that of the products. Results are
            rounded to the dtype of the products in either case.
        autocast: dtype that the model runs in where torch's autocast chooses to, torch.bfloat16 or torch.float16; None: in
            its own. Outputs, loss and products are in float32 then.
        compile: compile the linear programs that tangents J v may be taken by (True, or the name of a backend of
            ``torch.compile``). Compiling takes long; a program is used where it agrees with the recorded graph and is faster.
        output_memory: bytes that outputs may take at a time, with all that a product makes of them, or "auto" (64 MiB;
            on a GPU a thirty-second of its memory, if that is more). Larger outputs of a softmax loss (tokens × vocabulary) are
            made and dropped chunk by chunk, where the model ends in a linear layer; 0 takes one position at a time,
            ``float("inf")`` always all.
        verify: check each route once before it is believed, on the first batch and on every later one with an operation that
            none before it had: calls against the live model, tangents against gradients, second derivatives against a central
            difference and each other, structured inverses against products of their matrix. Costs a few gradients at the first
            product, and one product with three columns at the first structured solve; False leaves it out.
        graphs: capture kept products on a CUDA device as CUDA graphs, which are replayed without Python and launches: "auto"
            (after some products, where a graph gives the same numbers and is faster, measured once), True (wherever a graph
            gives the same numbers), or False. ``explain()`` says what was captured, or why not. The model is called on a
            stream of the problem's own. On other devices there is nothing to capture.
        progress: show a progress bar for passes over the data (on rank 0, where there are several).
        group: a process group of torch.distributed, as ``torch.distributed.group.WORLD``, or a ``DeviceMesh``: of one
            dimension, or of two for a model that is sharded along the first and parallelised along the second. Each process
            then has a part of the batches (:func:`curvalg.distributed.shard`; a part may be empty), L is the loss of all of
            them, and every process makes the same calls and gets the whole result. None: of this process alone.
        shard: "parameters": cut the parameters of a whole model over the processes of ``group``, and make them whole one module
            at a time. Models that ``fully_shard`` has cut stay cut so, without this. Vectors are parts then: ``op @ v`` takes
            and gives the numbers of this process (``problem.layout`` says which), results of solvers and estimators are of the
            whole.

    A problem is at one state: parameters, buffers, flags, attributes, hooks and submodules of model and loss, the objects of
    your own classes that these hold (and attributes and methods of the classes), variables that their functions close over or
    default to, and the tensors of data in memory. All of these are watched: where one changes, operators raise
    :class:`~curvalg.StaleError` until they are refreshed, and the next ``value()``, ``gradient()`` or lowering takes everything
    anew, on the device that the parameters are on by then. What a forward writes itself does not count. Not watched are files
    behind a loader, global variables, hooks for all modules, and writes into single elements of data past autograd (``t.data``,
    NumPy views: a sample of 4096 elements of each tensor on the CPU is compared); after such a change call :meth:`refresh`.

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

    services: ClassVar = Services(count, compare, per_sample_gradients, record_layers)
    _columns: Literal["auto", "loop"] | int

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        loss: Any,
        data: Any,
        *,
        wrt: str = "parameters",
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
        graphs: Literal["auto"] | bool = "auto",
        progress: bool = False,
        group: Any = None,
        shard: Shard = None,
    ) -> None:
        with LOCK:  # while another problem calls the same model, other tensors stand in it
            asked = with_respect_to(wrt, MadeOf(model, data, params, forward, target), loss, randomness, group, shard)
            made = make_model(asked.model, asked.params, asked.forward, shard, group)
        batches = read_for(loss, asked.data, asked.target)
        super().__init__(made, batches, (loss, reduction), DrawGuard(randomness), Budget(0))
        self.samples: Samples = one_of("samples", samples, ("item", "position", "element"))
        if samples != "item" and self.loss is not None and not self.loss.positions:
            raise LossError(
                f"samples={samples!r} needs a loss that says where its positions are, such as CrossEntropy(class_axis=...) or "
                f"MSE; {self.loss.name} does not. Use samples='item'"
            )
        if samples == "element" and self.loss is not None and self.loss.class_axis is not None:
            raise LossError(
                f"samples='element' is for losses that are sums over the numbers of their outputs, such as MSE; those of "
                f"{self.loss.name} are classes of one position. Use samples='position'"
            )
        self.columns = columns
        self.factored = one_of("factored", factored, ("auto", True, False))
        self.accumulate = accumulating(accumulate, self.dtype, self.device)
        self.autocast = casting(autocast, self.device)
        self.compiler = compiler(compile)
        self.cache = cache
        self.output_memory = output_bytes(output_memory)
        self.verify = self.compares = one_of("verify", verify, (True, False))
        self.capture = one_of("graphs", graphs, ("auto", True, False))
        self.progress = one_of("progress", progress, (True, False))
        grid = made.grid if isinstance(made, ShardedModel) else None
        self.group = make_group(group, self.device, self.lock, grid=grid)
        if isinstance(made, ShardedModel):
            made.join(self.group, self.group.vectors)
            self.layout = made.layout
            settle_options(self)
        join(self, loss) if not self.group.alone else require_whole_data(model, batches)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.budget = Budget(0)
        super().__setstate__(state)
        self.cache = self._cache

    # -- options ------------------------------------------------------------------------------------------------------

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
        self.budget.resize(limit, free)

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

    # -- state --------------------------------------------------------------------------------------------------------

    def _move(self, device: torch.device) -> None:
        super()._move(device)
        self.cache = self._cache  # of the memory that is free there
        self.accumulate = accumulating(self.accumulate, self.dtype, device)
        self.autocast = casting(self.autocast, device)

    def refresh(self) -> Problem:
        """Take everything as it is now: parameters and their device, buffers, flags, attributes, hooks, the loss, the data.

        Operators that were lowered before raise :class:`~curvalg.StaleError` until they are refreshed. Whatever is watched
        (see :class:`Problem`) is taken anew without this call as well; it is for what cannot be watched.

        Returns:
            The problem itself.

        >>> import torch
        >>> X, y = torch.randn(5, 3), torch.randn(5, 1)
        >>> problem = Problem(torch.nn.Linear(3, 1), torch.nn.MSELoss(), (X, y))
        >>> problem.num_samples, problem.refresh().num_samples
        (5, 5)
        """
        with self.lock:
            self._refreshes += 1
            self._snapshot = None
            self._new_structure()
        return self

    def with_data(self, data: Any, *, whole: bool = False) -> Problem:
        """The problem of the same model, loss and options on other data, such as the next minibatch of a training loop.

        What was verified of the model and measured on it holds there as well, so that a problem for every step costs little.

        Args:
            data: as of :class:`Problem`, read by the same ``forward`` and ``target``.
            whole: every process has all of these data, rather than a part, where several share the problem.

        >>> import torch
        >>> from curvalg import Identity, inverse, registry
        >>> net, (X, y) = torch.nn.Linear(3, 1), (torch.randn(20, 3), torch.ones(20, 1))
        >>> problem, damped = Problem(net, torch.nn.MSELoss(), (X, y)), registry.build("ggn") + 0.1 * Identity
        >>> before = problem.value()
        >>> for rows in torch.arange(20).split(10):
        ...     batch = problem.with_data((X[rows], y[rows]))
        ...     _ = batch.step(inverse(damped).lower(batch) @ batch.gradient(), 0.5)
        >>> problem.value() < before
        True
        """
        return self._on(self.data.like(data), whole=whole, lossless=False)

    def _on(self, data: Data, *, whole: bool, lossless: bool) -> Problem:
        """The same problem on other data."""
        require_parts(self, whole)
        if self.whole is not None:
            return self.whole._on(data, whole=whole, lossless=lossless).restricted(self.layout.names)
        with self.lock:
            twin = self._twin(data, lossless=lossless, whole=whole)
        twin.cache = self._cache
        return twin

    def with_inputs(self, data: Any, *, whole: bool = False) -> Problem:
        """The problem of the same model and parameters on inputs alone, without a loss: what outputs and Jacobians need.

        Args:
            data: as of :class:`Problem` with ``loss=None``, read by the same ``forward``.
            whole: every process has all of these data, rather than a part, where several share the problem.

        >>> import torch
        >>> from curvalg import Problem, registry
        >>> problem = Problem(torch.nn.Linear(3, 1), torch.nn.MSELoss(), (torch.randn(9, 3), torch.randn(9, 1)))
        >>> registry.build("jacobian").lower(problem.with_inputs(torch.randn(5, 3))).shape
        (5, 4)
        """
        return self._on(Data(data, None, needs_target=False), whole=whole, lossless=True)

    def step(self, direction: Any, size: float = 1.0) -> Problem:
        """Move the live parameters: θ − size · direction is written into them, and the state of the problem moves on.

        Args:
            direction: (D,), of any kind that a product with an operator takes: a tensor, an array, a dict or list of tensors.
            size: of the step.

        Returns:
            The problem itself.

        Raises:
            VectorError: a direction that does not fit, or is not finite.
            OptionError: a size that is no finite number.

        >>> import torch
        >>> problem = Problem(torch.nn.Linear(3, 1), torch.nn.MSELoss(), (torch.randn(9, 3), torch.randn(9, 1)))
        >>> before = problem.value()
        >>> problem.step(problem.gradient(), 0.01).value() < before
        True
        """
        if isinstance(size, bool) or not isinstance(size, Real) or not math.isfinite(size):
            raise OptionError(f"size is a finite number, got {size!r}")
        with self.lock, LOCK:
            self.model.update()
            params_.move(self.model.chosen, self.layout, direction, float(size))
        return self

    def close(self) -> None:
        """Release everything that is kept between products."""
        self.release()

    # -- passes over the data -----------------------------------------------------------------------------------------

    @property
    def num_samples(self) -> int:
        """The number N of samples whose share of the loss is not identically zero."""
        self.snapshot()
        return self.totals.count

    def evaluations(self, snapshot: Snapshot, *, order_matters: bool = False) -> Iterator[Evaluation]:
        """Go over the data once at a snapshot, one evaluation a batch."""
        order_matters = order_matters or self._strict_order or self.draws.mode == "frozen"
        # Which samples share a batch decides the matrix while they influence each other.
        order_matters = order_matters or bool(self.model.batch_statistics)
        if not self.group.alone:
            _ = self.totals  # known to all before any of them reads a batch
        samples: Iterable[ReadBatch] = self.read(order_matters)
        if self.group.sharded:
            samples = filled(samples, self.totals.most_batches, self.totals.borrowed)
        if self.progress:
            samples = tqdm(samples, "batches", leave=False)
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

    @contextmanager
    def batches(self) -> Iterator[Iterator[Batch]]:
        """Go over the data once as terms see it, at the parameters as they are now; batches live inside the context only.

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
        """The number of columns a row has in the factor of a term, found by one model call on the first batch.

        Where outputs are made in chunks there is no factor of a batch; the number is then that of all outputs.
        """
        if self.whole is not None:  # it does not depend on the parameters
            return self.whole.factor_columns(term)
        known = self._factor_columns
        if term not in known:
            with self.differentiating(), self.together("the number of columns of a factor"):
                own = factor_columns(self.evaluations(self.snapshot()), term, self.most_classes)
                known[term] = own if self.group.alone else int(max(n for (n,) in self.group.numbers(own)))
        return known[term]

    def value(self) -> float:
        """The loss L(θ) of the whole data set.

        Raises:
            ProblemError: it is not finite.
        """
        with self._over_data("the value of the loss") as evaluations:
            own = math.fsum(loss_of(evaluation) for evaluation in evaluations)
            total = math.fsum(number for (number,) in self.group.numbers(own))
        return finite(total / self.totals.denominator, math.isfinite(total), "value")

    def gradient(self) -> Tensor:
        """The gradient ∇L(θ) of the loss, shape (D,).

        Raises:
            ProblemError: it is not finite.
        """
        with self._over_data("the gradient of the loss") as evaluations:
            result = gradient_over(self, evaluations)
        return finite(result, all_finite(result), "gradient")

    def per_sample_gradients(self) -> Tensor:
        """The gradients s ∇cₙ of the samples' own losses in the order of the data, (N, D): N times the parameters in memory.

        Their sum is s ∇L: that of a mean loss over ``problem.num_samples``, which ignored samples do not count in, is its
        gradient. ``problem.per_sample_gradients().T`` are columns that operators multiply, and queries of
        :func:`~curvalg.estimate.influence`.

        Raises:
            LossError: samples have no losses of their own.
            ProblemError: samples influence each other (batch-norm in training mode), or parameters are sharded.

        >>> import torch
        >>> problem = Problem(torch.nn.Linear(3, 1), torch.nn.MSELoss(), (torch.randn(5, 3), torch.randn(5, 1)))
        >>> rows = problem.per_sample_gradients()
        >>> rows.shape, torch.allclose(rows.mean(0), problem.gradient(), atol=1e-6)
        (torch.Size([5, 4]), True)
        """
        with self._over_data("the gradients of single samples", order_matters=True) as evaluations:
            return gradient_rows(self, evaluations)

    @contextmanager
    def _over_data(self, what: str, *, order_matters: bool = False) -> Iterator[Iterator[Evaluation]]:
        """One pass over the data at the state as it is now, for something that needs the loss."""
        with self.lock:
            snapshot = self.snapshot()
            self.need_loss()
            with self.differentiating(), self.together(what):
                yield self.evaluations(snapshot, order_matters=order_matters)

    def __dir__(self) -> list[str]:
        """What users call; what the library itself needs of a problem is there as well, but not listed."""
        return list(PUBLIC)

    def __repr__(self) -> str:
        return described(self)

    def _repr_html_(self) -> str:
        return problem_card(self)

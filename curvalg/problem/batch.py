"""The batch that a term sees: outputs, targets, the loss, and what follows from them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol, Self, TypeVar, overload

import torch
from torch import Tensor

from curvalg.errors import LossError
from curvalg.losses import Loss, LossPoint
from curvalg.problem.model.layer_record import LayerRecord
from curvalg.problem.model.outputs import OutputForm
from curvalg.tensors import trees
from curvalg.tensors.partial_tensors import PartOfVector
from curvalg.tensors.random_numbers import uniforms

Samples = Literal["item", "position", "element"]


T = TypeVar("T")


class lazy(functools.cached_property[T]):
    """An attribute that is computed once, without the lock that ``functools.cached_property`` holds before Python 3.12.

    A thread that waits for a problem inside of it, and another that has the problem and waits for the attribute of another
    object, would wait for ever. Here two threads may compute the same value; the last one stays.
    """

    @overload
    def __get__(self, instance: None, owner: type[Any] | None = None) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type[Any] | None = None) -> T: ...

    def __get__(self, instance: object, owner: type[Any] | None = None) -> Self | T:
        if instance is None:
            return self
        values, name = instance.__dict__, str(self.attrname)
        if name not in values:
            values[name] = self.func(instance)
        value: T = values[name]
        return value


class Layers(Protocol):
    """The recording of a model's layers on one batch."""

    def records(self, cotangents: Tensor, *, independent: bool = False) -> list[LayerRecord]:
        """Records that cover every chosen parameter once, for cotangents (K, *output.shape)."""
        ...


class Batch:
    """One batch at the problem's parameters: outputs, targets, and everything a term may ask of the loss.

    Whatever it hands out carries each sample's share of the whole loss, cₙ = αₙ ℓₙ (class weights, ignored targets and
    the denominator of the whole data set inside): results of batches are added, never averaged.

    Args:
        output: z, detached, shape (n, ...); several outputs as their (n, -1) concatenation.
        form: how the output came from what the model returned.
        target: as the loss gets it.
        loss: the loss, or None.
        point: makes the loss at this output and target.
        scale: s, the number of samples N for a mean loss, 1 for a sum.
        count: N, the number of samples in the data set whose share is not identically zero.
        denominator: what a mean loss divides by, over the whole data set.
        samples: whether one sample is a row of the batch ("item"), a position of a row ("position": all classes there, or the
            vector along the last axis of an elementwise loss) or a number of an elementwise loss ("element").
        misaligned: shape of an output whose rows are not the samples of its batch, and their number, if there is one.
        start: running number of the first row in the data set.
        number: called where samples are identified by their running number; refuses data in random order.
        pullback: u -> Jᵀu (D,).
        per_sample: the gradients of all shares.
        layers: makes the recording of the model's layers.
        workspace: bytes that columns and what is made of them may take at a time.
    """

    def __init__(
        self,
        output: Tensor,
        form: OutputForm,
        target: Any,
        loss: Loss | None,
        point: Callable[[], LossPoint[Any]],
        *,
        scale: float,
        count: int,
        denominator: float,
        samples: Samples,
        misaligned: tuple[tuple[int, ...], int] | None,
        start: int,
        number: Callable[[], None],
        pullback: Callable[[Tensor], Tensor],
        per_sample: Callable[[Batch], dict[str, Tensor]],
        layers: Callable[[], Layers],
        workspace: int = 2**31,
    ) -> None:
        self.output = output
        self.workspace = workspace
        self.target = target
        self.scale = scale
        self.count = count
        self.samples = samples
        self._form = form
        self._loss = loss
        self._make_point = point
        self._misaligned = misaligned
        self._number = number
        self._start = start
        self._share = 1.0 / denominator
        self._pullback = pullback
        self._per_sample = per_sample
        self._layers = layers
        self._draws: dict[tuple[int, int, bool], Tensor] = {}

    @lazy
    def _point(self) -> LossPoint[Any]:
        if self._loss is None:
            raise LossError("this quantity needs a loss, but the problem was made with loss=None")
        return self._make_point()

    @property
    def weightless(self) -> bool:
        """Whether it counts for nothing: its process joins in the model calls of others, which have more batches."""
        return self._share == 0

    def counted(self, statistics: Any) -> Any:
        """What a term made of the batch: zeros where it is weightless, but for parts of vectors, which are sums already."""
        if not self.weightless:
            return statistics
        return trees.tensor_map(lambda t: t if isinstance(t, PartOfVector) else torch.zeros_like(t), statistics)

    @property
    def has_loss(self) -> bool:
        """Whether the problem has a loss."""
        return self._loss is not None

    def evaluate_loss(self) -> None:
        """Evaluate the loss at this output now: a callable is recorded, which vmap forbids inside of it."""
        if self._loss is not None:
            _ = self._point

    def value(self) -> Tensor:
        """The loss of the batch, a scalar that is not yet divided by the denominator."""
        return self._point.value()

    @property
    def class_axis(self) -> int | None:
        """The axis of the output that holds classes; None for elementwise losses."""
        return None if self._loss is None else self._loss.class_axis

    @property
    def labels(self) -> Tensor:
        """The class of each position; ignored ones hold a valid class and have weight 0.

        Raises:
            LossError: the loss has no classes.
        """
        labels = self._point.labels
        if labels is None:
            raise LossError(f"{type(self._loss).__name__} has no classes; use a loss such as CrossEntropy")
        return labels

    @lazy
    def weights(self) -> Tensor:
        """Weight αₙ of each position, broadcastable to the output."""
        return self._share * self._point.weights

    @lazy
    def loss_gradient(self) -> Tensor:
        """Gradient rₙ = ∂cₙ/∂zₙ of the loss, of the output's shape."""
        return self._share * self._form.join(self._point.gradient())

    def loss_hvp(self, tangent: Tensor) -> Tensor:
        """Product Bₙ ż with the Hessian of the loss, of the output's shape."""
        point, form = self._point, self._form
        product: Tensor = point.hvp(tangent) if form.single else form.join(point.hvp(form.split(tangent)))
        # With a large vocabulary this is the peak of a product: no buffer that can be done without.
        return product.mul_(self._share) if point.fresh else self._share * product

    def fisher_hvp(self, tangent: Tensor) -> Tensor:
        """The Fisher information of the likelihood in output space, times ż.

        Raises:
            LossError: the loss is no likelihood.
        """
        return self._share * self._form.join(self._point.fisher_hvp(self._form.split(tangent)))

    def _require_samples(self) -> None:
        """Raise LossError where samples have no losses of their own, or are not the rows of the output."""
        if self._loss is not None and not self._loss.facts.per_sample:
            raise self._loss.facts.without_samples("this quantity")
        if self._misaligned is not None:
            shape, rows = self._misaligned
            raise LossError(
                f"this quantity is made of single samples, but an output of shape {shape} does not have the {rows} samples "
                "of its batch as its rows. Return outputs with a row for each sample, such as forward=lambda model, batch: "
                "model(batch[0]).unflatten(0, (len(batch[0]), -1)), or give targets with a row for each row of the output by "
                "target="
            )

    def loss_factor(self) -> Tensor:
        """Columns (columns, *output.shape): Σ columns columnsᵀ is the block of B of each position (class losses) or element.

        Raises:
            LossError: B is not positive semi-definite.
        """
        self._require_samples()
        return self._point.factor() * math.sqrt(self._share)

    @property
    def loss_rank(self) -> int:
        """The number of columns that :meth:`row_factor` gives, without making them."""
        point = self._point
        per_block = point.rank
        return per_block * self._positions if self._blockwise else per_block

    def row_factor(self, *, fisher: bool = False, start: int = 0, stop: int | None = None) -> Tensor:
        """Columns (columns, *output.shape) whose outer products, row by row, sum to B: Σₖ sₖₙ sₖₙᵀ = Bₙ.

        Args:
            fisher: the Fisher information of the likelihood instead of B.
            start: number of the first column, among all :attr:`loss_rank` of B.
            stop: after that of the last; None: all. Only these are made: those of a large vocabulary do not fit together.

        Raises:
            LossError: B is not positive semi-definite, or there is no likelihood.
        """
        if fisher and not self._point.facts.fisher_is_ggn:
            # Where the Fisher differs from B it is diagonal in the outputs.
            every = self.spread(self.fisher_hvp(torch.ones_like(self.output)).sqrt()[None], elementwise=True)
            return every[start:stop]
        if start == 0 and (stop is None or stop >= self.loss_rank):
            columns = self.loss_factor()
            return self.spread(columns) if self._blockwise else columns
        stop, rank = self.loss_rank if stop is None else min(stop, self.loss_rank), self._point.rank
        parts = []
        for position in range(start // rank, -(-stop // rank)):
            first, last = max(start - position * rank, 0), min(stop - position * rank, rank)
            part = self._point.factor_part(first, last) * math.sqrt(self._share)
            parts.append(part * self._only(position) if self._blockwise else part)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _only(self, position: int) -> Tensor:
        """One at a position of every row, zero at all others."""
        axes = self._position_axes(self.class_axis)
        shape = [self.output.shape[axis] if axis in axes else 1 for axis in range(self.output.ndim)]
        mask = self.output.new_zeros(math.prod(shape))
        mask[position] = 1
        return mask.reshape(shape)

    @property
    def _blockwise(self) -> bool:
        """Whether B has a block for every position, rather than for every row."""
        return self._loss is not None and self._loss.positions

    @property
    def _positions(self) -> int:
        return math.prod(self.output.shape[axis] for axis in self._position_axes(self.class_axis))

    def _position_axes(self, class_axis: int | None) -> list[int]:
        ndim = self.output.ndim
        classes = None if class_axis is None else class_axis % ndim
        return [axis for axis in range(1, ndim) if axis != classes]

    def gradient_columns(self, scale: float | None = None) -> Tensor:
        """Columns c rₙ, one per sample of a row (columns, *output.shape).

        Args:
            scale: c; None: √s, with which their outer products make the covariance.

        Raises:
            LossError: samples have no losses of their own.
        """
        self._require_samples()
        scale = math.sqrt(self.scale) if scale is None else scale
        return self.per_sample_columns(scale * self.loss_gradient[None])

    def per_sample_columns(self, columns: Tensor) -> Tensor:
        """Columns (columns, *output.shape) as they are where a sample is a row, spread where it is a position."""
        return self._spread(columns, self._sample_axes)

    @property
    def _sample_axes(self) -> list[int]:
        """The axes of the output, beside the first, along which its numbers are of several samples."""
        axes = self._position_axes(self.class_axis)
        if self.samples == "position" and self.class_axis is None:
            return axes[:-1]  # a position of an elementwise loss is a vector
        return [] if self.samples == "item" else axes

    @property
    def row_samples(self) -> int:
        """The samples of a row: 1, or its positions or numbers where these are samples."""
        return math.prod(self.output.shape[axis] for axis in self._sample_axes)

    def spread(self, columns: Tensor, *, elementwise: bool = False) -> Tensor:
        """Every column (of the output's shape) as one column per position of a row, zero at all others.

        Args:
            columns: shape (columns, *output.shape).
            elementwise: take every element for a position, also where the loss has classes.

        Returns:
            Shape (positions · columns, *output.shape).
        """
        return self._spread(columns, self._position_axes(None if elementwise else self.class_axis))

    def _spread(self, columns: Tensor, axes: list[int]) -> Tensor:
        """Every column as one for each place along some axes, zero at all others."""
        sizes = [self.output.shape[axis] for axis in axes]
        if math.prod(sizes) == 1:
            return columns
        shape = [1] * self.output.ndim
        for axis, size in zip(axes, sizes, strict=True):
            shape[axis] = size
        masks = torch.eye(math.prod(sizes), dtype=columns.dtype, device=columns.device).reshape(-1, 1, *shape)
        return (masks * columns).flatten(0, 1)

    def pseudo_gradients(self, samples: int = 1, *, seed: int = 0, fisher: bool = False) -> Tensor:
        """Draws (samples, *output.shape), scaled by samples^-1/2, with E Σₘ sₘ sₘᵀ = B and positions independent.

        Depends only on the seed and the running number of each sample in the data set.

        Args:
            samples: number of draws.
            seed: seed of the draws.
            fisher: second moment of the Fisher instead of B.
        """
        self._require_samples()
        self._number()
        key = (samples, seed, fisher)
        if key not in self._draws:
            point = self._point
            draws = point.pseudo_gradients(self.uniform(samples, seed), fisher=fisher)
            self._draws[key] = draws * math.sqrt(self._share / samples)
        return self._draws[key]

    def uniform(self, samples: int, seed: int) -> Tensor:
        """The uniform numbers that draws are made of, (samples, *noise shape of the loss)."""
        z = self.output
        return uniforms(seed, samples, self._start, self._point.noise_shape, z.dtype, z.device)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Inner product per sample, broadcastable to the output."""
        self._require_samples()
        product = a * b
        inside = [axis for axis in range(1, product.ndim) if axis not in self._sample_axes]
        return product.sum(inside, keepdim=True) if inside else product

    def outer(self, columns: Tensor, tangent: Tensor) -> Tensor:
        """Products Σₘ sₘ (sₘᵀ ż) per sample, for columns sₘ of shape (columns, *output.shape)."""
        products = torch.func.vmap(lambda s: s * self.dot(s, tangent))(columns)
        return products.sum(0)  # type: ignore[no-any-return]

    def pull_by(self, pullback: Callable[[Tensor], Tensor]) -> None:
        """Take Jᵀu from here on by a graph that exists already, instead of by another model call."""
        self._pullback = pullback

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Vector-Jacobian product Jᵀu of this batch, shape (D,)."""
        return self._pullback(torch.zeros_like(cotangent) if self.weightless else cotangent)

    def per_sample_gradients(self) -> dict[str, Tensor]:
        """Gradients ∇cₙ by parameter, (n, *parameter.shape); n counts rows, or positions in row-major order.

        Raises:
            LossError: samples have no losses of their own.
            ProblemError: samples of the batch influence each other (batch-norm in training mode).
        """
        self._require_samples()
        return self._per_sample(self)

    def layers(self, cotangents: Tensor, *, independent: bool = False) -> Iterator[LayerRecord]:
        """Layer inputs and output deltas: gₖₙ = ∂⟨sₖₙ, zₙ⟩/∂θ for all columns k and rows n, in factored form.

        Every chosen parameter is in exactly one record. A record whose ``kind`` is "dense" (linear layers and convolutions,
        with or without a bias) has inputs h of shape (n, T, in) and deltas δ of shape (K, n, T, out), with one more leading
        axis each where a convolution has groups; T counts the positions that share the weight: tokens, places of a
        convolution (h are its patches), repeated uses. Then gₖₙ = Σₜ δₖₙₜ hₙₜᵀ for the weight, flattened to (out, in), and
        Σₜ δₖₙₜ for the bias. :class:`~curvalg.problem.LayerRecord` describes the other kinds, and what every record can do
        (``project``, ``combine``, ``gram``, ``squares``, ``explicit``). Rows are rows of the batch, whatever a sample is.

        Costs one model call and one backward pass with K columns; where the model could move rows, one more that checks which
        row is which. A weight that is packed, sliced or transposed first, and one that is used in several ways, comes as a
        "joint" record; attention and recurrent networks are taken apart. Parameters that are used in another way (in a function
        that is not linear in them) come as "explicit" records, at the cost of per-sample gradients for every column.

        Args:
            cotangents: s of shape (K, *output.shape), such as ``row_factor()`` for the Gauss-Newton matrix, or
                ``loss_gradient[None]`` for the gradient covariance. They carry the share of the loss, and so do the deltas.
            independent: whether rows of a column are draws whose products with each other vanish in the mean, as
                :meth:`pseudo_gradients` are. Where a model computes several rows of its output together (the tokens of a
                sequence, flattened to rows) these need columns of their own otherwise; with it they are one row of a record.

        Raises:
            ProblemError: rows of the batch influence each other (batch-norm in training mode).

        The two Kronecker factors of a linear layer, A = mean h hᵀ and B = Σ δ δᵀ:

        >>> import torch
        >>> from curvalg import Problem
        >>> X, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
        >>> problem = Problem(torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss(), (X, y))
        >>> with problem.batches() as batches:
        ...     (batch,) = batches
        ...     (layer,) = batch.layers(batch.row_factor())
        >>> layer.params, layer.kind, tuple(layer.inputs.shape), tuple(layer.deltas.shape)
        (('weight', 'bias'), 'dense', (5, 1, 3), (1, 5, 1, 2))
        >>> h, δ = layer.inputs.flatten(0, 1), layer.deltas.flatten(0, 2)
        >>> A, B = h.T @ h / len(h), δ.T @ δ
        >>> A.shape, B.shape
        (torch.Size([3, 3]), torch.Size([2, 2]))
        """
        yield from self._layers().records(cotangents, independent=independent)

    def sample_masks(self) -> list[Tensor]:
        """Masks (output's shape) that pick one sample each, in order."""
        axes = [0, *self._sample_axes]
        shape = [size if axis in axes else 1 for axis, size in enumerate(self.output.shape)]
        places = torch.ones(shape, device=self.output.device).nonzero()
        return [self._mask(tuple(int(k) if i in axes else slice(None) for i, k in enumerate(p))) for p in places]

    def row_masks(self) -> list[Tensor]:
        """Masks (output's shape) that pick one row each."""
        return [self._mask((row,)) for row in range(self.output.shape[0])]

    def _mask(self, index: tuple[int | slice, ...]) -> Tensor:
        mask = torch.zeros_like(self.output)
        mask[index] = 1
        return mask

"""One use of parameters in a forward pass, and its inputs and deltas."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvalg.problem.layers.kinds.convolution import Convolution, ConvolutionMap
from curvalg.problem.layers.kinds.maps import LinearMap, MatrixMap, WeightForm
from curvalg.problem.layers.origin import Origin
from curvalg.problem.model.layer_record import GuardedInput, Kind


class Declined(Exception):
    """Inputs and deltas do not give a parameter's gradients; the message says why."""


@dataclass(frozen=True)
class Call:
    """A call of a registered function.

    Args:
        values: its arguments by name; those not given are missing.
        leaves: argument -> how what stands there came from a parameter.
        output: what it returned.
        edge: where the gradient with respect to the output arrives. Unlike the tensor, it stays what it is when the output
            is later modified in place.
    """

    values: Mapping[str, Any]
    leaves: Mapping[str, Origin]
    output: Tensor
    edge: GradientEdge

    def roles(self, *allowed: str) -> dict[str, Origin]:
        """The parameters by argument.

        Raises:
            Declined: a parameter stands for another argument than the allowed ones.
        """
        if other := sorted(self.leaves.keys() - set(allowed)):
            raise Declined(f"it stands for the argument {other[0]!r}")
        if len({origin.name for origin in self.leaves.values()}) < len(self.leaves):
            raise Declined("it stands for several arguments of one call")
        return dict(self.leaves)


class Use(ABC):
    """Some parameters in one call of a function.

    Args:
        call: the call.
        roles: "weight" and "bias" -> how these came from parameters.
        source: the tensor that inputs are made from; held without its graph.
    """

    kind: ClassVar[Kind]

    def __init__(self, call: Call, roles: Mapping[str, Origin], source: Tensor | None) -> None:
        self.roles = dict(roles)
        self.edge = call.edge
        self.output_shape = call.output.shape
        self.output_dtype = call.output.dtype
        self._source = None if source is None else source.detach()
        self._version = 0 if source is None else source._version
        self.routing: Routing | None = None
        """Set where the inputs are not the rows of the batch in their order."""

    @property
    def source(self) -> Tensor:
        """The tensor that inputs are made from.

        Raises:
            Declined: it is no longer what it was in the call.
        """
        assert self._source is not None
        if self._source._version != self._version:
            raise Declined("the input of its layer is modified in place afterwards")
        return self._source

    @property
    def form(self) -> Any:
        """A key that is equal for uses of one parameter that can be put together."""
        return None

    @property
    def signature(self) -> tuple[Any, ...]:
        """What this use has in common with the same use in a call on fewer rows."""
        return self.kind, self.form, tuple(sorted(self.roles.items(), key=lambda item: item[0])), self.output_shape[1:]

    @property
    def routable(self) -> bool:
        """Whether every input could be of another row of the batch."""
        return True

    @abstractmethod
    def fits(self, rows: int) -> bool:
        """Whether the output has the rows of the batch, or several positions of each."""

    @property
    def names(self) -> set[str]:
        """The parameters that are used."""
        return {origin.name for origin in self.roles.values()}

    @abstractmethod
    def inputs(self, rows: int, dtype: torch.dtype) -> Tensor:
        """Inputs h as the record of this kind takes them."""

    def joined(self, others: Sequence[Use], rows: int, dtype: torch.dtype) -> GuardedInput | LinearMap:
        """Inputs h of this use and of others of the same parameters, their positions one after the other."""
        return GuardedInput(joined([use.inputs(rows, dtype) for use in (self, *others)], -2))

    @abstractmethod
    def deltas(self, gradient: Tensor, rows: int) -> Tensor:
        """Deltas δ as the record of this kind takes them, from the gradient with respect to the output (K, *output.shape)."""

    def arranged(self, gradient: Tensor) -> Tensor:
        """Gradients (K, *shape of the output) with axes of positions before all others."""
        return gradient

    def shifts(self, gradient: Tensor, rows: int) -> Tensor:
        """Deltas δ of an added parameter, (K, n, T, size)."""
        return self.deltas(gradient, rows)


class DenseUse(Use):
    """A linear map of a last axis, of patches, or over any axes of a contraction.

    Args:
        call: the call.
        roles: "weight" and "bias" -> how these came from parameters.
        form: of the weight; of the bias alone its groups count.
        unfold: source -> (N, ..., groups, in) for a source with N rows.
        fold: gradients (K, *shape of the output) -> (K, N, ..., groups, out).
        positions: sizes of the axes, of source and output alike, along which the map is repeated; None: of an image, whose
            first axis holds the rows.
        options: of a convolution that torch can do as it stands.
    """

    kind = "dense"

    def __init__(
        self,
        call: Call,
        roles: Mapping[str, Origin],
        form: WeightForm,
        unfold: Callable[[Tensor], Tensor],
        fold: Callable[[Tensor], Tensor],
        positions: tuple[int, ...] | None = None,
        options: Convolution | None = None,
    ) -> None:
        super().__init__(call, roles, call.values["input"] if "weight" in roles else None)
        self._form = form
        self._unfold = unfold
        self._fold = fold
        self._positions = positions
        self._options = options

    @property
    def routable(self) -> bool:
        return self._positions is not None

    @property
    def form(self) -> WeightForm:
        return self._form

    def check(self, shape: torch.Size, rows: int) -> None:
        """Raise Declined for a tensor of this shape that does not hold the rows of the batch."""
        check_rows(shape, rows, self._positions)

    def fits(self, rows: int) -> bool:
        return _holds(lambda: self.check(self.output_shape, rows))

    def inputs(self, rows: int, dtype: torch.dtype) -> Tensor:
        source = self.source
        if self.routing is not None:
            flat = self._unfold(source.to(dtype)).reshape(len(self.routing.owner), self._form.groups, -1)
            return self.routing.place(flat.transpose(0, 1)).contiguous()
        self.check(source.shape, rows)
        patches = self._unfold(source.to(dtype))
        return patches.reshape(rows, -1, *patches.shape[-2:]).permute(2, 0, 1, 3).contiguous()

    def joined(self, others: Sequence[Use], rows: int, dtype: torch.dtype) -> LinearMap:
        if others or self._options is None:
            held = super().joined(others, rows, dtype)
            assert isinstance(held, GuardedInput)
            return MatrixMap(self._form, held)
        self.check(self.source.shape, rows)
        image = GuardedInput(ConvolutionMap.laid_out(self.source.to(dtype)))
        return ConvolutionMap(self._form, self._options, image, rows, self._unfold)

    def deltas(self, gradient: Tensor, rows: int) -> Tensor:
        if self.routing is not None:
            folded = self._fold(gradient)
            flat = folded.reshape(len(gradient), len(self.routing.owner), *folded.shape[-2:])
            return self.routing.place(flat).permute(3, 0, 1, 2, 4).contiguous()
        self.check(gradient.shape[1:], rows)
        folded = self._fold(gradient)
        # The rows may be cut into several along axis 0, whose parts are then positions as well.
        parts = folded.reshape(len(gradient), rows, -1, *folded.shape[-2:])
        return parts.permute(3, 0, 1, 2, 4).contiguous()

    def arranged(self, gradient: Tensor) -> Tensor:
        return self._fold(gradient).flatten(-2)

    def shifts(self, gradient: Tensor, rows: int) -> Tensor:
        return self.deltas(gradient, rows).permute(1, 2, 3, 0, 4).flatten(3)


def _as_it_is(source: Tensor) -> Tensor:
    return source


class ElementUse(Use):
    """Parameters that are multiplied or added elementwise, broadcast over positions.

    Args:
        call: the call.
        roles: "weight" and "bias" -> how these came from parameters.
        shape: of the parameters, aligned with the last axes of the output.
        source: what the input is made from; None where nothing is multiplied.
        normalise: source -> the factor of the weight, of the output's shape up to broadcasting.
        sign: -1 where the parameter is subtracted.
    """

    kind = "scale"

    def __init__(
        self,
        call: Call,
        roles: Mapping[str, Origin],
        shape: torch.Size,
        source: Tensor | None,
        normalise: Callable[[Tensor], Tensor] = _as_it_is,
        sign: int = 1,
    ) -> None:
        super().__init__(call, roles, source)
        self._shape = shape
        self._normalise = normalise
        self._sign = sign

    def inputs(self, rows: int, dtype: torch.dtype) -> Tensor:
        factor = self._normalise(self.source).to(dtype).expand(self.output_shape)[None]
        if self.routing is not None:
            return self.routing.place(self.arranged(factor))[0]
        return by_position(factor, self._shape, rows)[0]

    def deltas(self, gradient: Tensor, rows: int) -> Tensor:
        signed = gradient if self._sign == 1 else -gradient
        if self.routing is not None:
            return self.routing.place(self.arranged(signed))
        return by_position(signed, self._shape, rows)

    @property
    def routable(self) -> bool:
        return self._fits_as(1)

    def arranged(self, gradient: Tensor) -> Tensor:
        return by_position(gradient, self._shape, 1)[:, 0] if self.routable else gradient

    def fits(self, rows: int) -> bool:
        return self._fits_as(rows)

    def _fits_as(self, rows: int) -> bool:
        return _holds(lambda: by_position(torch.empty(1, *self.output_shape, device="meta"), self._shape, rows))


class EmbeddingUse(Use):
    """A use of an embedding: rows of a table, picked by indices.

    Args:
        call: the call.
        padding: the index whose row gets no gradient, or None.
    """

    kind = "embedding"

    def __init__(self, call: Call, padding: int | None) -> None:
        super().__init__(call, call.roles("weight"), call.values["input"])
        self._padding = padding

    def inputs(self, rows: int, dtype: torch.dtype) -> Tensor:
        indices = self.source
        if self.routing is not None:
            return self.routing.place(indices.reshape(1, -1).long())[0]
        check_rows(indices.shape, rows, indices.shape)
        return indices.reshape(rows, -1).long()

    def fits(self, rows: int) -> bool:
        return _holds(lambda: check_rows(self.source.shape, rows, self.source.shape))

    def joined(self, others: Sequence[Use], rows: int, dtype: torch.dtype) -> GuardedInput:
        return GuardedInput(joined([use.inputs(rows, dtype) for use in (self, *others)], -1))

    def deltas(self, gradient: Tensor, rows: int) -> Tensor:
        if self._padding is not None:
            gradient = gradient * (self.source != self._padding)[..., None]
        if self.routing is not None:
            return self.routing.place(gradient.flatten(1, -2))
        check_rows(gradient.shape[1:], rows, gradient.shape[1:-1])
        return gradient.reshape(gradient.shape[0], rows, -1, gradient.shape[-1]).contiguous()


class SpreadTableUse(EmbeddingUse):
    """A use of a table whose picked rows are the same for all rows of the batch, as embedded positions.

    Args:
        use: of the table.
        spread: what meets the rows of the batch: the picked rows are added there.
        picked: how what is added came from the picked rows (T..., width).
    """

    def __init__(self, use: EmbeddingUse, spread: ElementUse, picked: Origin) -> None:
        self.__dict__.update(use.__dict__)
        self.edge, self.output_shape, self.output_dtype = spread.edge, spread.output_shape, spread.output_dtype
        self._spread, self._picked = spread, picked
        self._shape = use.output_shape

    @property
    def routable(self) -> bool:
        return False

    def fits(self, rows: int) -> bool:
        return self._spread.fits(rows)

    def inputs(self, rows: int, dtype: torch.dtype) -> Tensor:
        return self.source.reshape(1, -1).long().expand(rows, -1)

    def deltas(self, gradient: Tensor, rows: int) -> Tensor:
        # What several picked rows have become may be added at several places of each row of the batch.
        summed = self._spread.deltas(gradient, rows).sum(2)
        added = summed.reshape(-1, *self._picked.shape(self._shape))
        back = self._picked.pull(added, self._shape).reshape(*summed.shape[:2], -1, self._shape[-1])
        if self._padding is not None:
            back = back * (self.source != self._padding).reshape(-1, 1)
        return back.contiguous()


def joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Tensors put one after the other; a single one as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)


def check_rows(shape: torch.Size, rows: int, positions: Sequence[int] | None = None) -> None:
    """Whether the positions of a tensor are the rows of the batch, or several of each.

    Args:
        shape: of a tensor.
        rows: n.
        positions: sizes of its axes of positions; None: the first one.

    Raises:
        Declined: they are not.
    """
    leading = math.prod(shape[:1] if positions is None else positions)
    if not shape or leading % rows:
        raise Declined(
            f"the first axis of a tensor of shape {tuple(shape)} is not made of the {rows} rows of the batch"
        )


def _holds(check: Callable[[], object]) -> bool:
    """Whether a check passes."""
    try:
        check()
    except Declined:
        return False
    return True


def channels_last(groups: int) -> Callable[[Tensor], Tensor]:
    """Gradients (K, N, channels, ...) with respect to an image as (K, N, ..., groups, channels of one group)."""
    return partial(_channels_last, groups)


def _channels_last(groups: int, gradient: Tensor) -> Tensor:
    unfolded: Tensor = gradient.movedim(2, -1).unflatten(-1, (groups, -1))
    return unfolded


@dataclass(frozen=True)
class Routing:
    """Which row of the batch each input of a layer belongs to, where they come in an order of their own (experts).

    Args:
        owner: the row of every input (L,).
        slot: its number among the inputs of that row (L,).
        rows: n.
        width: the most inputs of a row, T.
    """

    owner: Tensor
    slot: Tensor
    rows: int
    width: int

    @staticmethod
    def of(owner: Tensor, rows: int) -> Routing:
        """Make the routing from the row of every input."""
        order = torch.argsort(owner, stable=True)
        counts = torch.bincount(owner, minlength=rows)
        first = counts.cumsum(0) - counts
        slot = torch.empty_like(owner)
        slot[order] = torch.arange(len(owner), device=owner.device) - first[owner[order]]
        return Routing(owner, slot, rows, int(counts.max()) if len(owner) else 1)

    def place(self, tensor: Tensor) -> Tensor:
        """The tensor (K, L, ...) as (K, n, T, ...), zero where a row has fewer inputs."""
        result = tensor.new_zeros(tensor.shape[0], self.rows, self.width, *tensor.shape[2:])
        result[:, self.owner, self.slot] = tensor
        return result

    @property
    def real(self) -> Tensor:
        """Which positions (n, T) are inputs."""
        return self.place(torch.ones(1, len(self.owner), device=self.owner.device))[0] != 0


def by_position(tensor: Tensor, shape: torch.Size, rows: int) -> Tensor:
    """A tensor (K, N, ...) as (K, n, T, size): T are the axes along which a parameter of this shape is broadcast."""
    aligned = (1,) * (tensor.ndim - 1 - len(shape)) + tuple(shape)
    shared_first = next((i for i, size in enumerate(aligned) if size != 1), len(aligned))
    # Rows may be spread over several leading axes (folded into one later on).
    lead = next((i for i in range(1, shared_first + 1) if math.prod(tensor.shape[1 : i + 1]) % rows == 0), 1)
    tensor, aligned = tensor.flatten(1, lead), aligned[lead - 1 :]
    full = tensor.shape[1:]
    check_rows(full, rows)
    if len(aligned) > len(full) or aligned[0] != 1:
        raise Declined("it has numbers of its own for every row of the batch")
    parts = tensor.reshape(tensor.shape[0], rows, full[0] // rows, *full[1:])
    shared = [axis + 2 for axis in range(1, len(full)) if aligned[axis] == 1]
    own = [axis + 2 for axis in range(1, len(full)) if aligned[axis] != 1]
    count = math.prod(parts.shape[axis] for axis in [2, *shared])
    return parts.permute(0, 1, 2, *shared, *own).reshape(tensor.shape[0], rows, count, -1).contiguous()

"""The table of torch functions that give inputs and deltas: one registration per layer function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvalg.problem.layers.kinds.convolution import Convolution
from curvalg.problem.layers.kinds.maps import WeightForm
from curvalg.problem.layers.kinds.patches import grouped, padded, spread_out, windows
from curvalg.problem.layers.origin import Origin
from curvalg.problem.layers.torch_calls.contraction import contracted
from curvalg.problem.layers.uses import Call, Declined, DenseUse, ElementUse, EmbeddingUse, Use, channels_last
from curvalg.problem.model.corrections import fixed_batch_norm


@dataclass(frozen=True)
class LayerRow:
    """One row of the table: a function of torch and what its calls are.

    Args:
        function: the function of torch.
        arguments: its positional arguments; a last "..." stands for any others.
        use: what a call is; raises Declined where the parameter's gradients need more than inputs and deltas.
    """

    function: Callable[..., Any]
    arguments: tuple[str, ...]
    use: Callable[[Call], Use]

    def has_more(self, args: Sequence[Any]) -> bool:
        """Whether there are more arguments than are known."""
        return len(args) > len(self.arguments) and self.arguments[-1] != "..."


TABLE: dict[Any, LayerRow] = {}
"""Function -> its row."""

MakeUse = Callable[[Call], Use]


def register(arguments: str, *functions: Callable[..., Any]) -> Callable[[MakeUse], MakeUse]:
    """Make the decorated function say what calls of the given functions are.

    Args:
        arguments: names of their positional arguments, separated by spaces; built-in functions do not give them.
        functions: as ``__torch_function__`` gets them.
    """

    def enter(use: MakeUse) -> MakeUse:
        TABLE.update({function: LayerRow(function, tuple(arguments.split()), use) for function in functions})
        return use

    return enter


@register("input weight bias", F.linear)
def linear(call: Call) -> Use:
    """A linear layer h Wᵀ + b."""
    if call.values["input"].ndim < 2:
        raise Declined("its input has no axis of rows")
    return contracted(call, call.roles("weight", "bias"), "...i,oi->...o", call.values["weight"].ndim)


@register("bias input weight", torch.addmm, torch.Tensor.addmm)
def added_product(call: Call) -> Use:
    """A product with a sum, b + h W."""
    if call.values.get("beta", 1) != 1 or call.values.get("alpha", 1) != 1 or call.values["bias"].ndim != 1:
        raise Declined("it is used in addmm with factors, or with a matrix that is added")
    return contracted(call, call.roles("weight", "bias"), "...i,io->...o", 2)


@register(
    "input other",
    *(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__),
    *(torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm),
)
def product(call: Call) -> Use:
    """A matrix product h W or W h, also of stacks of matrices."""
    left, right = (call.values[k].ndim for k in ("input", "other"))
    if min(left, right) < 2 or len(call.leaves) != 1:
        raise Declined("it is used in a product that is not one of two matrices or stacks of them, of which it is one")
    stacked = "abcdefgh"[: min(call.values[next(iter(call.leaves))].ndim - 2, 8)]
    return _two(call, f"...{stacked}pq,...{stacked}qr->...{stacked}pr")


@register("equation input other", torch.einsum, torch.functional.einsum)
def einsum(call: Call) -> Use:
    """A contraction of a parameter and one other tensor."""
    if not isinstance(call.values.get("other"), Tensor) or len(call.leaves) != 1:
        raise Declined("it is used in an einsum that is not of it and one other tensor")
    return _two(call, call.values["equation"].replace(" ", ""))


def _two(call: Call, equation: str) -> Use:
    """A contraction of two operands, of which one came from a parameter."""
    terms, arrow, output = equation.partition("->")
    if not arrow:
        raise Declined("it is used in an einsum without ->")
    operands = dict(zip(("input", "other"), terms.split(","), strict=True))
    ((argument, origin),) = call.leaves.items()
    data = "other" if argument == "input" else "input"
    turned = Call({"input": call.values[data], "weight": call.values[argument]}, {}, call.output, call.edge)
    written = f"{operands[data]},{operands[argument].replace('...', '')}->{output}"
    return contracted(turned, {"weight": origin}, written, call.values[argument].ndim)


# -- convolutions -------------------------------------------------------------------------------------------------------


def _spatial(value: int | Sequence[int], axes: int) -> list[int]:
    """One number for every spatial axis."""
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def _image(call: Call) -> tuple[int, list[int]]:
    """The number of spatial axes, and the kernel's size."""
    kernel = list(call.values["weight"].shape[2:])
    if call.values["input"].ndim != len(kernel) + 2:
        raise Declined("its input has no axis of rows")
    return len(kernel), kernel


@register("input weight bias stride padding dilation groups", F.conv1d, F.conv2d, F.conv3d)
def convolution(call: Call) -> Use:
    """A convolution: patches times the weight."""
    axes, kernel = _image(call)
    stride, dilation = (_spatial(call.values.get(name, 1), axes) for name in ("stride", "dilation"))
    padding = call.values.get("padding", 0)
    if padding == "same":  # an odd number of zeros has its extra one behind
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        before = [t // 2 for t in total]
        after = [t - b for t, b in zip(total, before, strict=True)]
    else:
        before = after = _spatial(0 if padding == "valid" else padding, axes)
    groups = call.values.get("groups", 1)
    form = WeightForm(call.values["weight"].shape, groups)
    options = Convolution(tuple(stride), tuple(before), tuple(dilation), (0,) * axes) if before == after else None
    return DenseUse(
        call,
        call.roles("weight", "bias"),
        form,
        partial(_patches, before, after, kernel, stride, dilation, groups),
        channels_last(groups),
        options=options,
    )


def _patches(
    before: Sequence[int],
    after: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    source: Tensor,
) -> Tensor:
    """The windows of an image that a convolution multiplies."""
    return grouped(windows(padded(source, before, after), kernel, stride, dilation), groups)


def _flipped_patches(
    before: Sequence[int],
    after: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    source: Tensor,
) -> Tensor:
    """The windows of the spread-out image that a transposed convolution multiplies."""
    axes = len(kernel)
    patches = windows(padded(spread_out(source, stride), before, after), kernel, [1] * axes, dilation)
    return grouped(patches.flip(list(range(-axes, 0))), groups)


@register(
    "input weight bias stride padding output_padding groups dilation",
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)
def transposed_convolution(call: Call) -> Use:
    """The convolution, with the flipped kernel, of the input with zeros between its elements."""
    axes, kernel = _image(call)
    stride, dilation = (_spatial(call.values.get(name, 1), axes) for name in ("stride", "dilation"))
    padding, extra = (_spatial(call.values.get(name, 0), axes) for name in ("padding", "output_padding"))
    before = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    after = [b + e for b, e in zip(before, extra, strict=True)]
    groups = call.values.get("groups", 1)
    form = WeightForm(call.values["weight"].shape, groups, transposed=True)

    unfold = partial(_flipped_patches, before, after, kernel, stride, dilation, groups)
    options = Convolution(*map(tuple, (stride, padding, dilation, extra)))
    return DenseUse(call, call.roles("weight", "bias"), form, unfold, channels_last(groups), options=options)


# -- embeddings -----------------------------------------------------------------------------------------------------------


@register("input weight padding_idx max_norm norm_type scale_grad_by_freq sparse", F.embedding)
def embedding(call: Call) -> Use:
    """An embedding: rows of a table."""
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if call.values.get(option):
            raise Declined(f"the option {option} of its embedding has no factored form")
    padding = call.values.get("padding_idx")
    if padding is not None and padding < 0:
        padding += call.values["weight"].shape[0]
    return EmbeddingUse(call, padding)


@register("weight input", torch.Tensor.__getitem__)
def picked(call: Call) -> Use:
    """Rows of a table, by an integer tensor."""
    index = call.values["input"]
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool:
        raise Declined("it is indexed otherwise than by integers")
    if call.values["weight"].ndim != 2 or bool((index < 0).any()):
        raise Declined("it is indexed by negative numbers, or is no table of rows")
    return EmbeddingUse(call, None)


# -- the affine part of normalisation -----------------------------------------------------------------------------------


def _affine(call: Call, function: Callable[..., Tensor], shape: torch.Size, **changed: Any) -> Use:
    roles = call.roles("weight", "bias")
    without = {k: v for k, v in call.values.items() if k not in ("input", "weight", "bias")} | changed
    normalise = partial(_normalised, function, without)
    return ElementUse(call, roles, shape, call.values["input"] if "weight" in roles else None, normalise)


def _normalised(function: Callable[..., Tensor], options: Mapping[str, Any], source: Tensor) -> Tensor:
    with torch.no_grad():
        return function(source, **options)


def _channels(call: Call) -> torch.Size:
    x = call.values["input"]
    return torch.Size((x.shape[1], *[1] * (x.ndim - 2)))


@register("input normalized_shape weight bias eps", F.layer_norm)
def layer_norm(call: Call) -> Use:
    """Layer normalisation: statistics of the last axes."""
    return _affine(call, F.layer_norm, torch.Size(call.values["normalized_shape"]))


@register("input normalized_shape weight eps", F.rms_norm)
def rms_norm(call: Call) -> Use:
    """RMS normalisation: mean squares of the last axes."""
    return _affine(call, F.rms_norm, torch.Size(call.values["normalized_shape"]))


@register("input num_groups weight bias eps", F.group_norm)
def group_norm(call: Call) -> Use:
    """Group normalisation: statistics of groups of channels."""
    return _affine(call, F.group_norm, _channels(call))


@register("input running_mean running_var weight bias training momentum eps", F.batch_norm, fixed_batch_norm)
def batch_norm(call: Call) -> Use:
    """Batch normalisation with running statistics: those of the batch would make its rows depend on each other."""
    if call.values.get("training"):
        raise Declined("its batch normalisation is in training mode")
    return _affine(call, F.batch_norm, _channels(call))


@register("input running_mean running_var weight bias use_input_stats momentum eps", F.instance_norm)
def instance_norm(call: Call) -> Use:
    """Instance normalisation: statistics of each channel of each row."""
    # Normalising once more must not update the running statistics.
    fixed = {} if call.values.get("use_input_stats") is False else {"running_mean": None, "running_var": None}
    return _affine(call, F.instance_norm, _channels(call), **fixed)


# -- plain sums and products ----------------------------------------------------------------------------------------------


def _operand(call: Call) -> tuple[str, Origin, Tensor]:
    """The one argument that came from a parameter, how it did, and the other operand."""
    roles = call.roles("input", "other")
    if len(roles) != 1:
        raise Declined("it is combined with another parameter")
    ((argument, origin),) = roles.items()
    other = call.values["other" if argument == "input" else "input"]
    if not isinstance(other, Tensor):
        raise Declined("it is combined with a number before it meets the data")
    if call.values.get("alpha", 1) != 1 or call.values.get("out") is not None:
        raise Declined("it is added with the option alpha or out")
    return argument, origin, other


@register("input other", torch.add, torch.Tensor.add, torch.Tensor.add_)
def added(call: Call) -> Use:
    """A sum x + b with a parameter."""
    argument, origin, _ = _operand(call)
    return ElementUse(call, {"bias": origin}, call.values[argument].shape, None)


@register("input other", torch.sub, torch.subtract, torch.Tensor.sub, torch.Tensor.sub_, torch.Tensor.subtract)
def subtracted(call: Call) -> Use:
    """A difference x - b or b - x with a parameter."""
    argument, origin, _ = _operand(call)
    sign = 1 if argument == "input" else -1
    return ElementUse(call, {"bias": origin}, call.values[argument].shape, None, sign=sign)


@register("input other", torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.multiply)
def multiplied(call: Call) -> Use:
    """An elementwise product x ∘ w with a parameter."""
    argument, origin, other = _operand(call)
    return ElementUse(call, {"weight": origin}, call.values[argument].shape, other)


# -- copies for every row -------------------------------------------------------------------------------------------------


@register("input ...", torch.Tensor.expand, torch.Tensor.expand_as, torch.broadcast_to, torch.Tensor.broadcast_to)
def expanded(call: Call) -> Use:
    """A parameter that is laid out for every row of the batch: a sum with zeros."""
    return ElementUse(call, {"bias": call.leaves["input"]}, call.values["input"].shape, None)


@register("input ...", torch.Tensor.repeat, torch.tile, torch.Tensor.tile)
def repeated(call: Call) -> Use:
    """A parameter that is copied for every row of the batch."""
    shape = call.values["input"].shape
    aligned = (1,) * (call.output.ndim - len(shape)) + tuple(shape)
    if any(old not in (1, new) for old, new in zip(aligned, call.output.shape, strict=True)):
        raise Declined("it is repeated along an axis that it has")
    return expanded(call)


SUMS = (added, subtracted)
"""The rules of functions that add a parameter to other numbers, place by place."""

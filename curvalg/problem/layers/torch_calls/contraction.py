"""Products of a parameter with a tensor, written as contractions, as linear layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

from torch import Tensor

from curvalg.problem.layers.kinds.maps import WeightForm
from curvalg.problem.layers.origin import Origin, PathStep
from curvalg.problem.layers.uses import Call, Declined, DenseUse


def contracted(call: Call, roles: Mapping[str, Origin], equation: str, axes: int) -> DenseUse:
    """The use of a weight in a contraction: its axes are outputs, inputs, or groups that have inputs of their own.

    Args:
        call: the call, with the values "input" and "weight".
        roles: "weight" and "bias" -> how these came from parameters.
        equation: as of torch.einsum, of "input" and "weight".
        axes: of the weight; its shape where the weight did not come from a parameter is not needed.

    Raises:
        Declined: an axis of the weight is summed by itself, taken twice, or broadcast.
    """
    source, weight = call.values["input"], call.values["weight"]
    terms, _, output = equation.partition("->")
    data, own = terms.split(",")
    batch = "".join(chr(ord("A") + i) for i in range(source.ndim - len(data.replace("...", ""))))
    data, output = data.replace("...", batch), output.replace("...", batch)
    if len(data) != source.ndim or len(own) != axes or len(output) != call.output.ndim:
        raise Declined("it is broadcast over stacks of matrices")
    sizes = dict(zip(own, weight.shape, strict=True))
    plain = all(len(set(word)) == len(word) for word in (data, own, output))
    if not plain or any(sizes.get(axis, size) != size for axis, size in zip(data, source.shape, strict=True)):
        raise Declined("it is used in a product that takes an axis twice, or broadcasts it")
    groups = [axis for axis in own if axis in data and axis in output]
    inputs = [axis for axis in own if axis in data and axis not in output]
    outputs = [axis for axis in own if axis not in data and axis in output]
    positions = [axis for axis in data if axis not in own]
    if len(groups) + len(inputs) + len(outputs) < len(own) or any(axis not in output for axis in positions):
        raise Declined("it is used in a product that sums over an axis of one operand alone")

    inward = [data.index(axis) for axis in (*positions, *groups, *inputs)]
    outward = [0, *(output.index(axis) + 1 for axis in (*positions, *groups, *outputs))]
    count, n, width = (math.prod(sizes[axis] for axis in part) for part in (groups, inputs, outputs))

    def unfold(x: Tensor) -> Tensor:
        x = x.permute(inward)
        return x.reshape(*x.shape[: len(positions)], count, n)

    def fold(gradient: Tensor) -> Tensor:
        gradient = gradient.permute(outward)
        return gradient.reshape(*gradient.shape[: len(positions) + 1], count, width)

    # Rows may lie anywhere among the positions that come first.
    transposed = list(own) == [*groups, *inputs, *outputs]
    lying = [*groups, *inputs, *outputs] if transposed else [*groups, *outputs, *inputs]
    shape = (count * n, width) if transposed else (count * width, n)
    roles = dict(roles)
    if "weight" in roles:
        roles["weight"] = _arranged(roles["weight"], [own.index(axis) for axis in lying], shape, tuple(weight.shape))
    form = WeightForm(weight.new_empty(shape, device="meta").shape, count, transposed)
    found = dict(zip(data, source.shape, strict=True))
    return DenseUse(call, roles, form, unfold, fold, tuple(found[axis] for axis in positions))


def _arranged(origin: Origin, order: list[int], shape: tuple[int, int], before: tuple[int, ...]) -> Origin:
    """The origin of a weight after its axes were put in order and made two."""
    if order == list(range(len(order))) and shape == before:
        return origin
    return origin.then(PathStep(f"permute{order}.reshape{shape}", partial(_permuted, order, shape)))


def _permuted(order: list[int], shape: tuple[int, int], weight: Tensor) -> Tensor:
    return weight.permute(order).reshape(shape)

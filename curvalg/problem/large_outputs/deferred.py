"""Outputs of a last linear layer that are not made: what makes them is kept instead, until somebody needs the numbers.

The logits of a language model, tokens × vocabulary, are the largest tensor there is, and a loss reads them one position
after the other. While a model is called under :class:`Deferring`, a linear layer with such an output gives a
:class:`Deferred` tensor, which can be moved around (transposed, reshaped, sliced by positions, cast) but not computed with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curvalg.problem.layers.capture import label
from curvalg.tensors import trees

Move = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Deferring(TorchFunctionMode):
    """While the model runs, linear layers whose outputs are large give deferred ones.

    Args:
        weights: id -> name, of the tensors that are weights or biases; a layer with others (computed ones) is left alone.
        limit: bytes of an output above which it is deferred.
        inner: names of weights that are known not to be of the last layer.

    Attributes:
        used: weight of a layer -> the function that needed its outputs.
    """

    def __init__(self, weights: Mapping[int, str], limit: float, inner: Collection[str]) -> None:
        super().__init__()
        self._weights, self._limit, self._inner = weights, limit, inner
        self.used: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        deferred = self._defer(*args, **kwargs) if func is F.linear else None
        return func(*args, **kwargs) if deferred is None else deferred

    def _defer(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Deferred | None:
        name = self._weights.get(id(weight))
        if name is None or name in self._inner or (bias is not None and id(bias) not in self._weights):
            return None
        if isinstance(input, Deferred) or torch._C._functorch.is_functorch_wrapped_tensor(input):
            return None
        if weight.ndim != 2 or input.ndim < 2 or input.shape[-1] != weight.shape[1] or input.dtype != weight.dtype:
            return None
        if torch.is_autocast_enabled(input.device.type):  # the layer would compute in another precision
            return None
        positions, classes = math.prod(input.shape[:-1]), weight.shape[0]
        if classes < 2 or positions * classes * max(weight.itemsize, 4) <= self._limit:
            return None
        grid = torch.arange(positions, device=input.device).reshape(*input.shape[:-1], 1)
        bias_name = None if bias is None else self._weights[id(bias)]
        return Deferred(Linear(input, weight, bias, name, bias_name, self.used), grid, grid.ndim - 1, (), ())


class Linear:
    """A call of a linear layer that was not carried out.

    Args:
        hidden: its input h (..., in).
        weight: W (out, in).
        bias: b (out,), or None.
        weight_name: what W is called.
        bias_name: what b is called.
        used: where to note the function that needs the output.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_name: str,
        bias_name: str | None,
        used: dict[str, str],
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.weight_name, self.bias_name = weight_name, bias_name
        self.used = used


class Deferred(Tensor):
    """The outputs of a linear layer, moved around but not made.

    It has their shape and dtype and no memory. Functions that only move (see ``_MOVES``) give another one; every other
    function gets the real numbers, so that what a model computes is what it would be; that it happened is noted in
    ``linear.used``. The call is then not used for derivatives: operations in place would have reached a copy only, and
    what a ``torch.autograd.Function`` gets is cut off from the layer.

    Args:
        linear: the layer's call.
        grid: the number of the row of h that each position comes from, of the outputs' shape with 1 for the class axis.
        axis: the class axis.
        casts: dtypes that the outputs were cast to, in order.
        moves: the functions that gave this tensor, in order.
    """

    linear: Linear
    grid: Tensor
    axis: int
    casts: tuple[torch.dtype, ...]
    moves: tuple[Move, ...]

    @staticmethod
    def __new__(
        cls, linear: Linear, grid: Tensor, axis: int, casts: tuple[torch.dtype, ...], moves: tuple[Move, ...]
    ) -> Deferred:
        shape = list(grid.shape)
        shape[axis] = linear.weight.shape[0]
        dtype = casts[-1] if casts else linear.weight.dtype
        made: Deferred = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=linear.weight.device)
        made.linear, made.grid, made.axis, made.casts, made.moves = linear, grid, axis, casts, moves
        return made

    def made(self) -> Tensor:
        """The real numbers of the outputs."""
        linear = self.linear
        z = F.linear(linear.hidden, linear.weight, linear.bias)
        for func, args, kwargs in self.moves:
            z = func(z, *args, **kwargs)
        return z

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        rule = _MOVES.get(func)
        if rule is not None and isinstance(args[0], Deferred):
            moved = rule(args[0], func, args[1:], kwargs)
            if moved is not None:
                return moved

        def make(t: Tensor) -> Tensor:
            if not isinstance(t, Deferred):
                return t
            t.linear.used.setdefault(t.linear.weight_name, label(func))
            return t.made()

        args, kwargs = trees.tensor_map(make, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} reached the outputs of a linear layer that are not made yet")


DeferredRule = Callable[[Deferred, Any, tuple[Any, ...], dict[str, Any]], "Deferred | None"]


def _sized(deferred: Deferred) -> Tensor:
    """A tensor of the outputs' shape without any memory."""
    return torch.empty(deferred.shape, dtype=deferred.dtype, device="meta")


def _moved(deferred: Deferred, grid: Tensor, axis: int, move: Move) -> Deferred:
    return Deferred(deferred.linear, grid, axis, deferred.casts, (*deferred.moves, move))


def _by_axes(deferred: Deferred, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Deferred | None:
    """A function that acts on every axis by itself: the class axis is whole if its length in outputs and grid shows it."""
    try:
        grid, shape = func(deferred.grid, *args, **kwargs), func(_sized(deferred), *args, **kwargs).shape
    except (IndexError, RuntimeError):  # such as one class picked: then the real numbers are made
        return None
    apart = [axis for axis, (one, many) in enumerate(zip(grid.shape, shape, strict=False)) if one != many]
    whole = grid.ndim == len(shape) and len(apart) == 1 and shape[apart[0]] == deferred.linear.weight.shape[0]
    return _moved(deferred, grid, apart[0], (func, args, kwargs)) if whole else None


def _indexed(deferred: Deferred, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Deferred | None:
    """Plain indices act on every axis by itself; masks and lists of places may not."""
    index = args[0] if isinstance(args[0], tuple) else (args[0],)
    # A bool is an int to isinstance, but an index of another kind.
    plain = all(i is None or i is Ellipsis or type(i) in (int, slice) for i in index)
    return _by_axes(deferred, func, args, kwargs) if plain else None


def _in_order(deferred: Deferred, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Deferred | None:
    """A function that keeps the row-major order: the class axis is whole if as many entries come before it as did."""
    try:
        made = func(_sized(deferred), *args, **kwargs)
    except (IndexError, RuntimeError, TypeError):
        return None
    if made.dtype != deferred.dtype:  # a view of the bits
        return None
    classes, before = deferred.linear.weight.shape[0], math.prod(deferred.shape[: deferred.axis])
    places = [a for a, n in enumerate(made.shape) if n == classes and math.prod(made.shape[:a]) == before]
    if not places:
        return None
    shape = list(made.shape)
    shape[places[0]] = 1
    return _moved(deferred, deferred.grid.reshape(shape), places[0], (func, args, kwargs))


def _cast(deferred: Deferred, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Deferred | None:
    """A function that changes the dtype and nothing else."""
    given = [*args, *kwargs.values()]
    if not all(isinstance(value, torch.dtype) for value in given) or kwargs.keys() - {"dtype"}:
        return None
    dtype = func(torch.empty(0, dtype=deferred.dtype, device="cpu"), *args, **kwargs).dtype
    if not dtype.is_floating_point:
        return None
    move = (func, args, kwargs)
    return Deferred(deferred.linear, deferred.grid, deferred.axis, (*deferred.casts, dtype), (*deferred.moves, move))


_T = Tensor
_QUESTIONS: frozenset[Any] = frozenset(
    [_T.shape.__get__, _T.dtype.__get__, _T.device.__get__, _T.ndim.__get__, _T.layout.__get__, _T.is_cuda.__get__]  # type: ignore[attr-defined]
    + [_T.size, _T.dim, _T.ndimension, _T.numel, _T.nelement, _T.__len__, torch.numel]
    + [_T.is_floating_point, torch.is_floating_point, _T.is_complex, torch.is_complex]
)
"""What may be asked without having the numbers."""

_MOVES: dict[Any, DeferredRule] = {
    **dict.fromkeys(
        [_T.transpose, _T.swapaxes, _T.swapdims, _T.permute, _T.movedim, _T.moveaxis, _T.narrow, _T.mT.__get__]  # type: ignore[attr-defined]
        + [torch.transpose, torch.swapaxes, torch.swapdims, torch.permute, torch.movedim, torch.moveaxis, torch.narrow],
        _by_axes,
    ),
    **dict.fromkeys(
        [_T.view, _T.reshape, _T.flatten, _T.unflatten, _T.squeeze, _T.unsqueeze, _T.contiguous]
        + [torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze],
        _in_order,
    ),
    **dict.fromkeys([_T.to, _T.float, _T.double, _T.half, _T.bfloat16], _cast),
    _T.__getitem__: _indexed,
}
"""Functions that move outputs without computing with them. To add one, say by which rule the class axis stays whole."""

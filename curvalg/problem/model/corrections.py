"""Functions of torch whose derivatives are wrong, or are not derivatives, or slow, written in others.

The test ``tests/problem/verification/test_torch_formulas.py`` says when torch mends one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_variadic

from curvalg.errors import ProblemError


class Model(Protocol):
    """What is remembered about a model."""

    corrected: bool | None
    composite: bool


class Corrected(TorchFunctionMode):
    """Exchanges such functions while a model runs. The first call of a model shows whether it has any.

    Args:
        model: the model; where it is ``composite``, normalisations are exchanged as well.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._model, self._used = model, False
        self._table = CORRECTIONS | COMPOSITES if model.composite else CORRECTIONS

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        correction = self._table.get(func)
        if correction is None:
            return func(*args, **(kwargs or {}))
        self._used = True
        return correction(*args, **(kwargs or {}))

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if self._model.corrected is None and exception[0] is None:
            self._model.corrected = self._used


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / ‖v‖: the double backward of ``torch._weight_norm`` is wrong (torch 2.13, on CPU)."""
    axes = [axis for axis in range(v.ndim) if axis != dim % v.ndim] if dim != -1 else None
    scale: Tensor = g / torch.linalg.vector_norm(v, dim=axes, keepdim=axes is not None)
    return v * scale


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """The rows of a table, with their derivative.

    The padding's row is a constant in reverse mode, but has a tangent in forward mode (torch 2.13). Gradients that are
    scaled by frequencies are no derivatives; sparse ones cannot be added up in a vector.
    """
    _refuse_max_norm("embedding", input, weight, max_norm, norm_type)
    rows = F.embedding(input, weight, padding_idx)
    if padding_idx is None:
        return rows
    index = padding_idx % weight.shape[0]
    return torch.where((input == index)[..., None], weight.detach()[index], rows)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Sums, means or maxima of rows of a table, with dense gradients that are the derivatives."""
    _refuse_max_norm("embedding_bag", input, weight, max_norm, norm_type)
    return F.embedding_bag(
        input,
        weight,
        offsets,
        mode=mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=padding_idx,
    )


def _refuse_max_norm(name: str, input: Tensor, weight: Tensor, max_norm: float | None, norm_type: float) -> None:
    if max_norm is None:
        return
    norms = torch.linalg.vector_norm(weight.detach()[input.reshape(-1)], norm_type, dim=1)
    if bool((norms > max_norm).any()):
        raise ProblemError(
            f"{name} with max_norm={max_norm:g} rewrites its weights in forward, so that there is no one state to be "
            "differentiated at; normalise the weights once and set max_norm to None"
        )


def fixed_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation; with running statistics it is affine, and the second derivative of the fused form takes some thirty
    operations instead (a third of the Hessian of a ResNet). Modes around it see one function, as of torch's own."""
    if has_torch_function_variadic(input, weight, bias):
        given = (input, running_mean, running_var, weight, bias, training, momentum, eps)
        return handle_torch_function(fixed_batch_norm, (input, weight, bias), *given)
    if training or running_mean is None or running_var is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    channels = (-1, *[1] * (input.ndim - 2))
    return input * scale.reshape(channels) + shift.reshape(channels)


def _addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    """input + value · tensor1 · tensor2: ``torch.func.linearize`` ends the process where only the input has a tangent
    (torch 2.13)."""
    return input + value * (tensor1 * tensor2)


CORRECTIONS: dict[Any, Callable[..., Tensor]] = {
    torch.addcmul: _addcmul,
    Tensor.addcmul: _addcmul,
    F.batch_norm: fixed_batch_norm,
    torch._weight_norm: _weight_norm,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
}

# -- normalisations in elementary operations --------------------------------------------------------------------------------


def _normalised(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(axes, keepdim=True)
    result: Tensor = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
    return result


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _channelled(x: Tensor, t: Tensor | None) -> Tensor | None:
    """A tensor of one number a channel, broadcastable to (n, channels, ...)."""
    return None if t is None else t.reshape(-1, *[1] * (x.ndim - 2))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _scaled(_normalised(input, tuple(range(-len(normalized_shape), 0)), eps), weight, bias)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    small = torch.finfo(input.dtype).eps if eps is None else eps
    axes = tuple(range(-len(normalized_shape), 0))
    return _scaled(input * torch.rsqrt(input.square().mean(axes, keepdim=True) + small), weight, None)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    groups = input.reshape(len(input), num_groups, math.prod(input.shape[1:]) // num_groups)
    x = _normalised(groups, (2,), eps).reshape(input.shape)
    return _scaled(x, _channelled(input, weight), _channelled(input, bias))


def _statistics_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    axes: tuple[int, ...] | None,
    eps: float,
) -> Tensor:
    """Normalisation by the statistics of the input over some axes, or by the running ones (which are not moved)."""
    if axes is not None:
        x = _normalised(input, axes, eps)
    else:
        mean, variance = _channelled(input, running_mean), _channelled(input, running_var)
        assert mean is not None
        assert variance is not None
        x = (input - mean) * torch.rsqrt(variance + eps)
    return _scaled(x, _channelled(input, weight), _channelled(input, bias))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    axes = (0, *range(2, input.ndim)) if training or running_mean is None else None
    return _statistics_norm(input, running_mean, running_var, weight, bias, axes, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    axes = tuple(range(2, input.ndim)) if use_input_stats or running_mean is None else None
    return _statistics_norm(input, running_mean, running_var, weight, bias, axes, eps)


COMPOSITES: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}
"""Their fused forms have wrong derivatives inside a graph that is differentiated a third time (forces, physics-informed
networks; torch 2.13). Used where a model's second derivatives were found wrong without them."""

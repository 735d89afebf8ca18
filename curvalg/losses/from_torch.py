"""Conversion of what a user passes as a loss to a Loss: two tables, one row per torch loss."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import nn

from curvalg.errors import LossError, LossTypeError
from curvalg.losses.callable import NLL, CallableLoss
from curvalg.losses.closed_forms.binary import BCEWithLogits
from curvalg.losses.closed_forms.cross_entropy import CrossEntropy
from curvalg.losses.closed_forms.gaussian import GaussianNLL
from curvalg.losses.closed_forms.kl_div import KLDiv
from curvalg.losses.closed_forms.poisson import PoissonNLL
from curvalg.losses.closed_forms.regression import MSE, Huber, SmoothL1
from curvalg.losses.loss import Loss
from curvalg.losses.validation import check_reduction

TABLE: dict[type[nn.Module], Callable[[Any], Loss]] = {
    nn.BCEWithLogitsLoss: BCEWithLogits.from_module,
    nn.CrossEntropyLoss: CrossEntropy.from_module,
    nn.GaussianNLLLoss: GaussianNLL.from_module,
    nn.HuberLoss: Huber.from_module,
    nn.KLDivLoss: KLDiv.from_module,
    nn.L1Loss: SmoothL1.from_module,
    nn.MSELoss: MSE.from_module,
    nn.NLLLoss: NLL.from_module,
    nn.PoissonNLLLoss: PoissonNLL.from_module,
    nn.SmoothL1Loss: SmoothL1.from_module,
}
"""The loss of a module of torch.nn, from the module."""


def _l1(*, reduction: Any = "mean") -> SmoothL1:
    return SmoothL1(beta=0.0, reduction=reduction)


def _kl_div(*, log_target: bool = False, reduction: Any = "mean") -> KLDiv:
    return KLDiv(log_target=log_target, reduction=reduction)


def _cross_entropy(
    *, weight: Any = None, ignore_index: int = -100, label_smoothing: float = 0.0, reduction: Any = "mean"
) -> CrossEntropy:
    return CrossEntropy(weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)


FUNCTIONS: dict[Callable[..., Any], Callable[..., Loss]] = {
    F.binary_cross_entropy_with_logits: BCEWithLogits,
    F.cross_entropy: _cross_entropy,
    F.gaussian_nll_loss: GaussianNLL,
    F.huber_loss: Huber,
    F.kl_div: _kl_div,
    F.l1_loss: _l1,
    F.mse_loss: MSE,
    F.nll_loss: NLL.from_options,
    F.poisson_nll_loss: PoissonNLL,
    F.smooth_l1_loss: SmoothL1,
}
"""The loss of a function of torch.nn.functional, from its keyword options."""

_LEGACY = ("size_average", "reduce")


def resolve_loss(loss: object, reduction: str | None = None) -> Loss:
    """The Loss that a user means by a torch module, a function of torch.nn.functional, a Loss or any callable.

    Args:
        loss: the loss; options of a function are bound by ``functools.partial`` with keywords.
        reduction: ``"mean"`` or ``"sum"``, for callables that do not declare theirs.

    Returns:
        A closed form where there is one, else a :class:`CallableLoss`.

    Raises:
        LossError: if it is no loss, has an option that is not supported, or declares another reduction.

    Reference: the loss functions of :mod:`torch.nn`.

    >>> import torch
    >>> resolve_loss(torch.nn.HuberLoss(delta=2.0))
    Huber(delta=2.0, reduction='mean')
    >>> resolve_loss(functools.partial(torch.nn.functional.mse_loss, reduction="sum"))
    MSE(reduction='sum')
    """
    if reduction is not None:
        check_reduction("Problem", reduction)
    loss = getattr(loss, "_orig_mod", loss)  # a compiled module has no double backward; the original has
    if isinstance(loss, type):
        raise LossError(f"expected a loss, got the class {loss.__name__}; create it: {loss.__name__}()")
    if isinstance(loss, Loss):
        return _agreed(loss, reduction, loss)
    if isinstance(loss, nn.Module):
        return _agreed(_from_module(loss, reduction), reduction, loss)
    if callable(loss):
        return _agreed(_from_function(loss, reduction), reduction, loss)
    raise LossTypeError(
        "expected a loss module of torch.nn, a function of torch.nn.functional, a curvalg Loss or a callable "
        f"(output, target) -> scalar, got {type(loss).__name__}; write torch.nn.CrossEntropyLoss(), in the order "
        "Problem(model, loss, data)"
    )


def _agreed(loss: Loss, reduction: str | None, given: object) -> Loss:
    if reduction is None or loss.reduction == reduction:
        return loss
    if isinstance(loss, CallableLoss) and loss.reduction is None:
        return CallableLoss(loss.fn, reduction=reduction, class_axis=loss.class_axis)
    raise LossError(
        f"reduction={reduction!r} contradicts {type(given).__name__}, whose reduction is {loss.reduction!r}; leave "
        "reduction= out, or build the loss with it"
    )


def _from_module(module: nn.Module, reduction: str | None) -> Loss:
    for kind in type(module).__mro__:
        # A subclass keeps the closed form of its parent only as long as it computes the same.
        same = type(module).forward is getattr(kind, "forward", None) and "forward" not in vars(module)
        if same and kind in TABLE:
            return TABLE[kind](module)
    declared = reduction
    if type(module).__module__ == nn.MSELoss.__module__:
        declared = getattr(module, "reduction", None)
        _check_torch(type(module).__name__, declared)
    return CallableLoss(module, reduction=declared)


def _from_function(function: Callable[..., Any], reduction: str | None) -> Loss:
    inner: Callable[..., Any] = function
    positional: tuple[Any, ...] = ()
    options: dict[str, Any] = {}
    if isinstance(function, functools.partial):
        inner, positional, options = function.func, function.args, dict(function.keywords)
    if getattr(inner, "__module__", None) != F.__name__ or "reduction" not in inspect.signature(inner).parameters:
        return CallableLoss(function, reduction=reduction)
    if positional:
        raise LossError(
            f"{inner.__name__}: expected a partial with keyword options only, got {len(positional)} positional "
            "arguments, which would take the place of output and target; name them"
        )
    for name in _LEGACY:
        if name in options:
            raise LossError(f"{inner.__name__}: the legacy option {name} is not supported; use reduction= instead")
    if inner in FUNCTIONS:
        return _build(inner, options)
    declared = options.get("reduction", inspect.signature(inner).parameters["reduction"].default)
    _check_torch(inner.__name__, declared)
    return CallableLoss(function, reduction=declared)


def _build(function: Callable[..., Any], options: dict[str, Any]) -> Loss:
    factory = FUNCTIONS[function]
    allowed = inspect.signature(factory).parameters
    for name in options:
        if name not in allowed:
            raise LossError(
                f"{function.__name__}: the option {name} is not supported; supported are {', '.join(allowed)}. "
                "Write the loss as a callable of its own to use it"
            )
    return factory(**options)


def _check_torch(name: str, declared: object) -> None:
    if declared is not None:
        check_reduction(name, declared)

"""The model as a function of the chosen parameters, called without touching the user's module."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvalg.errors import ProblemError
from curvalg.problem import parameters as params_
from curvalg.problem.data import call_model

# The attention kernel and the compile stance are switches of the whole process: one product at a time may hold them.
_SWITCHES = threading.RLock()


@contextmanager
def differentiable(device: torch.device, recurrent: bool) -> Iterator[None]:
    """Where a product may be taken: gradients on, and only kernels that can be differentiated twice.

    Fused attention has neither a double backward nor forward AD, the encoder fast path and cuDNN's recurrent layers
    neither; compiled code has no double backward. Autocast of the caller's is switched off: the matrix is that of the
    model in its own dtype (a model that casts inside its forward still does).
    """
    with _SWITCHES, ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        fast_path = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        if recurrent and device.type == "cuda":
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if "torch._dynamo" in sys.modules:  # something may be compiled; importing dynamo only to ask is slow
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and compiled wrappers."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


class _Adapter(nn.Module):
    """Holds the user's module, so that ``forward(model, batch)`` sees it with exchanged parameters."""

    def __init__(self, module: nn.Module, rule: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.module = module
        self.rule = rule

    def forward(self, batch: Any) -> Any:
        return self.rule(self.module, batch)


Rule = Callable[[Any, Any], Any]


class ModuleModel:
    """An ``nn.Module`` as a function (tensors of the chosen parameters, batch) -> output.

    Args:
        module: the unwrapped module.
        params: which parameters.
        rule: ``forward(model, batch)``.
    """

    def __init__(self, module: nn.Module, params: params_.Selection, rule: Rule | None) -> None:
        self.module = module
        self.rule = rule
        self.chosen = params_.select(module, params)
        self.recurrent = any(isinstance(child, nn.RNNBase) for child in module.modules())

    def state(self) -> dict[str, Tensor]:
        """Every parameter and buffer, one key per (module, slot)."""
        return {**params_.parameter_slots(self.module), **params_.buffer_slots(self.module)}

    def flags(self) -> tuple[bool, ...]:
        """The training flags of all modules."""
        return tuple(child.training for child in self.module.modules())

    def __call__(self, chosen: Mapping[int, Tensor], state: Mapping[str, Tensor], batch: Any) -> Any:
        """The output on one batch.

        Args:
            chosen: id of a chosen parameter -> the tensor to use for it.
            state: private copies of everything else, by the keys of :meth:`state`.
            batch: the batch as read.
        """
        own = params_.parameter_slots(self.module)
        tensors = {f"module.{key}": chosen.get(id(p), state[key]) for key, p in own.items()}
        # Buffers are cloned in every call: batch-norm in training mode writes its running statistics into them.
        tensors |= {f"module.{key}": state[key].clone() for key in params_.buffer_slots(self.module)}
        adapter = _Adapter(self.module, self.rule or call_model)
        # tie_weights=False with one key per slot: the default leaves plain tensors behind in a module that is reached
        # under two names.
        with _attributes_restored(self.module):
            return functional_call(adapter, tensors, (batch,), tie_weights=False)


@contextmanager
def _attributes_restored(module: nn.Module) -> Iterator[None]:
    """Put back what a forward leaves on its modules.

    Recurrent layers keep a list of the exchanged weights (and with it the whole graph) until their next forward; others
    store activations.
    """
    before = [(child.__dict__, dict(child.__dict__)) for child in module.modules()]
    try:
        yield
    finally:
        for live, saved in before:
            for name in live.keys() - saved.keys():
                del live[name]
            live.update(saved)


class CallableModel:
    """A function ``(params, inputs) -> output`` with its parameters in a dict."""

    recurrent = False

    def __init__(self, function: Callable[[dict[str, Tensor], Any], Any], params: Any, rule: Rule | None) -> None:
        if not isinstance(params, Mapping):
            raise ProblemError(
                "a model that is a function (params, inputs) -> output needs its parameters: pass params={name: tensor}"
            )
        self.function = function
        self.rule = rule
        self.own = dict(params)
        self.chosen = params_.check(self.own)

    def state(self) -> dict[str, Tensor]:
        """Every parameter."""
        return self.own

    def flags(self) -> tuple[bool, ...]:
        """A function has no training flags."""
        return ()

    def __call__(self, chosen: Mapping[int, Tensor], state: Mapping[str, Tensor], batch: Any) -> Any:
        """The output on one batch; see :class:`ModuleModel`."""
        tensors = {name: chosen.get(id(p), state[name]) for name, p in self.own.items()}
        if self.rule is not None:
            return self.rule(lambda inputs: self.function(tensors, inputs), batch)
        return call_model(lambda *args, **kwargs: self.function(tensors, args[0] if args else kwargs), batch)


Model = ModuleModel | CallableModel


def make_model(model: Any, params: params_.Selection, forward: Rule | None) -> Model:
    """The model as a function of its chosen parameters.

    Raises:
        ProblemError: neither a module nor a function, or a selection that does not fit.
    """
    if isinstance(model, nn.Module):
        return ModuleModel(unwrap(model), params, forward)
    if callable(model):
        return CallableModel(model, params, forward)
    raise ProblemError(
        f"model must be an nn.Module or a function (params, inputs) -> output, got {type(model).__name__}"
    )


def explain_failure(error: Exception) -> str | None:
    """A cure for failures of autograd that are known, else None."""
    message = str(error)
    for part, cure in _KNOWN_FAILURES.items():
        if part in message:
            return cure
    return None


_KNOWN_FAILURES: dict[str, str] = {
    "Checkpointing is not compatible with .grad()": (
        "reentrant activation checkpointing cannot be differentiated twice; use torch.utils.checkpoint.checkpoint(..., "
        "use_reentrant=False)"
    ),
    "use_reentrant": (
        "reentrant activation checkpointing cannot be differentiated twice; use torch.utils.checkpoint.checkpoint(..., "
        "use_reentrant=False)"
    ),
    "_thnn_fused": "a fused recurrent layer cannot be differentiated twice on this device",
    "is not implemented for": "an operation of the model lacks a second derivative; replace it by one that has it",
    "double backward": "an operation of the model lacks a second derivative; replace it by one that has it",
    "derivative for": "an operation of the model lacks a second derivative; replace it by one that has it",
}


def ordered(chosen: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """id of a chosen parameter -> the tensor to use for it."""
    return {id(p): t for p, t in zip(chosen.values(), tensors, strict=True)}

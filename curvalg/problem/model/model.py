"""The model as a function of the chosen parameters, called without touching the user's module."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _saved_tensors_hooks_set_tracing as _set_hooks_tracing
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from curvalg.errors import ProblemError
from curvalg.problem.data.batches import call_model
from curvalg.problem.data.process import LOCK
from curvalg.problem.model import parameters as params_
from curvalg.problem.model.corrections import Corrected
from curvalg.problem.model.sharded import require_unsharded
from curvalg.problem.model.snapshot import Slot
from curvalg.tensors.backward import REENTRANT


@contextmanager
def recording(model: Model, *, once: bool = False) -> Iterator[None]:
    """The context in which the model (and a loss that is the user's code) is called: kernels that differentiate twice.

    Fused attention has neither a double backward nor forward AD, the encoder fast path and cuDNN's recurrent layers
    neither; compiled code has no double backward; the one of torch's weight norm is wrong. A reentrant checkpoint whose
    inputs need no gradient only warns and then drops its parameters: that warning becomes an error.

    Args:
        model: the model.
        once: whether one backward is all that follows; fused attention, which holds no positions × positions, may be used then.
    """
    with LOCK, ExitStack() as stack, warnings.catch_warnings():
        warnings.filterwarnings("error", message=REENTRANT)
        if not once:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # Non-reentrant checkpoints recompute in the backward pass, with the live parameters in place of the exchanged ones.
        # While saved tensors are traced they save what they would recompute. Where parameters stay exchanged they need not.
        stack.callback(_set_hooks_tracing, _set_hooks_tracing(not model.recomputes))
        fast_path = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        if model.corrected is not False or model.composite:
            stack.enter_context(Corrected(model))
        if model.recurrent:
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


class RuleModule(nn.Module):
    """Holds the user's module, so that ``forward(model, batch)`` sees it with exchanged parameters."""

    def __init__(self, module: nn.Module, rule: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.module = module
        self.rule = rule

    def forward(self, batch: Any) -> Any:
        return self.rule(self.module, batch)


Adapter = Callable[[Any, Any], Any]


class ModuleModel:
    """An ``nn.Module`` as a function (tensors of the chosen parameters, batch) -> output.

    Args:
        module: the unwrapped module.
        params: which parameters.
        rule: ``forward(model, batch)``.
    """

    divided: frozenset[str] = frozenset()
    """Names of the slots of which this process has a part only."""
    recomputes = False
    """Whether checkpoints recompute, with the right parameters, or save what they would recompute."""

    @property
    def layout(self) -> params_.Layout:
        """The places of the chosen parameters in vectors."""
        return params_.Layout(self.chosen)

    def places(self, name: str) -> tuple[Sequence[tuple[int, int]], int] | None:
        """Where the numbers of a slot lie in the whole tensor.

        Returns:
            Runs (first place, length), and how many processes hold the same ones; None for what no process has a part of.
        """
        return None

    def whole(self) -> AbstractContextManager[None]:
        """A context of model calls and of the passes back through them."""
        return nullcontext()

    def __init__(self, module: nn.Module, params: params_.Selection, rule: Adapter | None) -> None:
        self.module = module
        self.rule = rule
        self.chosen = self._select(params)
        self.forms = params_.Forms(self.chosen)
        for name, owner, key in self.slots():
            if isinstance(owner[key], (UninitializedParameter, UninitializedBuffer)):
                raise ProblemError(f"{name!r} is not initialised yet; run the model once on a batch first")
        self.recurrent = any(isinstance(child, nn.RNNBase) for child in module.modules())
        self.corrected: bool | None = None
        """Whether functions with wrong derivatives are used; None before the first call."""
        self.composite = False
        """Whether normalisations are to be written in elementary operations (``corrections``)."""

    def _select(self, params: params_.Selection) -> dict[str, Tensor]:
        require_unsharded(self.module)
        return params_.check(params_.selected(self.module, params))

    @property
    def given(self) -> object:
        """The user's object: what is remembered of a model is remembered of this."""
        return self.module

    @property
    def live(self) -> Mapping[str, Tensor]:
        """The chosen parameters as the user's code has them."""
        return self.chosen

    @property
    def entrance(self) -> torch.device | None:
        """The device of the first parameter, where the model expects its inputs; None where that says nothing."""
        return _entrance(self.module.parameters())

    @property
    def batch_statistics(self) -> list[str]:
        """Modules through which the samples of a batch influence each other."""
        return [
            name or type(child).__name__
            for name, child in self.module.named_modules()
            if isinstance(child, nn.modules.batchnorm._NormBase)
            and not isinstance(child, nn.modules.instancenorm._InstanceNorm)
            and (child.training or child.running_mean is None)
        ]

    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """All modules by name, each once."""
        return [(name or type(child).__name__, child) for name, child in self.module.named_modules()]

    def functions(self) -> list[tuple[str, Any]]:
        """Functions of the user's that the output comes from, besides the rule."""
        return []

    def slots(self) -> list[Slot]:
        """The place of every parameter and buffer, one name per (module, slot)."""
        return params_.slots(self.module, "_parameters") + params_.slots(self.module, "_buffers")

    def update(self) -> None:
        """Take the parameters that stand under the chosen names now.

        Raises:
            ProblemError: a parameter is gone, or has another shape or dtype.
        """
        self.chosen = self.forms.checked(dict(self.module.named_parameters(remove_duplicate=False)))

    def __call__(self, leaves: Sequence[Tensor], state: Mapping[str, Tensor], batch: Any) -> Any:
        """The output on one batch.

        Args:
            leaves: tensors to use for the chosen parameters, in their order.
            state: private copies of everything, by the names of :meth:`slots`.
            batch: the batch as read.
        """
        given = {id(p): leaf for p, leaf in zip(self.chosen.values(), leaves, strict=True)}
        tensors = {
            f"module.{name}": given.get(id(owner[key]), state[name])
            for name, owner, key in params_.slots(self.module, "_parameters")
        }
        # Buffers are cloned in every call: batch-norm in training mode writes its running statistics into them.
        buffers = params_.slots(self.module, "_buffers")
        tensors |= {f"module.{name}": state[name].clone() for name, _, _ in buffers}
        adapter = RuleModule(self.module, self.rule or call_model)
        # tie_weights=False with one key per slot: the default leaves plain tensors behind in a module that is reached
        # under two names.
        return functional_call(adapter, tensors, (batch,), tie_weights=False)

    def call_live(self, state: Mapping[str, Tensor], batch: Any) -> Any:
        """The output on one batch of the user's module itself, with its own parameters; buffers are copies."""
        buffers = {f"module.{n}": state[n].clone() for n, _, _ in params_.slots(self.module, "_buffers")}
        return functional_call(RuleModule(self.module, self.rule or call_model), buffers, (batch,), tie_weights=False)


class CallableModel:
    """A function ``(params, inputs) -> output`` with its parameters in a dict."""

    recurrent = recomputes = False
    divided: frozenset[str] = frozenset()
    batch_statistics: list[str] = []  # noqa: RUF012

    def __init__(self, function: Callable[[dict[str, Tensor], Any], Any], params: Any, rule: Adapter | None) -> None:
        if not isinstance(params, Mapping):
            raise ProblemError(
                "a model that is a function (params, inputs) -> output needs its parameters: pass params={name: tensor}"
            )
        self.function = function
        self.rule = rule
        self.own = params
        self.chosen = params_.check(params)
        self.forms = params_.Forms(self.chosen)
        self.corrected: bool | None = None
        self.composite = False

    @property
    def layout(self) -> params_.Layout:
        """The places of the chosen parameters in vectors."""
        return params_.Layout(self.chosen)

    def places(self, name: str) -> None:
        """No process has a part; see :class:`ModuleModel`."""

    def whole(self) -> AbstractContextManager[None]:
        """A context of model calls; see :class:`ModuleModel`."""
        return nullcontext()

    @property
    def given(self) -> object:
        """The function; see :class:`ModuleModel`."""
        return self.function

    @property
    def live(self) -> Mapping[str, Tensor]:
        """The chosen parameters; see :class:`ModuleModel`."""
        return self.chosen

    @property
    def entrance(self) -> torch.device | None:
        """The device of the first parameter; see :class:`ModuleModel`."""
        return _entrance(self.own.values())

    def named_modules(self) -> list[tuple[str, nn.Module]]:
        return []

    def functions(self) -> list[tuple[str, Any]]:
        return [("model", self.function)]

    def slots(self) -> list[Slot]:
        return [(name, self.own, name) for name in self.own]

    def update(self) -> None:
        """Take the tensors that stand in the user's dict now.

        Raises:
            ProblemError: a parameter is gone, or has another shape or dtype.
        """
        self.chosen = self.forms.checked(self.own)

    def __call__(self, leaves: Sequence[Tensor], state: Mapping[str, Tensor], batch: Any) -> Any:
        """The output on one batch; see :class:`ModuleModel`."""
        given = {id(p): leaf for p, leaf in zip(self.chosen.values(), leaves, strict=True)}
        tensors = {name: given.get(id(p), state[name]) for name, p in self.own.items()}
        if self.rule is not None:
            return self.rule(lambda inputs: self.function(tensors, inputs), batch)
        return call_model(lambda *args, **kwargs: self.function(tensors, args[0] if args else kwargs), batch)

    def call_live(self, state: Mapping[str, Tensor], batch: Any) -> Any:
        """The output on one batch, with the user's own tensors."""
        return self(list(self.chosen.values()), self.own, batch)


Model = ModuleModel | CallableModel


def _entrance(parameters: Iterable[Any]) -> torch.device | None:
    first = next((p for p in parameters if isinstance(p, Tensor)), None)
    # Parameters on the meta device are loaded when they are needed, to wherever that is.
    return None if first is None or first.is_meta else first.device


def called_wrongly(error: TypeError) -> bool:
    """Whether a TypeError comes from how the model was called, not from inside its forward."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is None:
        return False
    where = frame.tb_frame.f_code.co_filename.replace("\\", "/")
    return where.endswith(("torch/nn/modules/module.py", "data/batches.py", "model/model.py"))

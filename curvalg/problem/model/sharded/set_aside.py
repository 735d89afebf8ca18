"""What stands in a sharded module while it is called here: weights on request, and none of the hooks that communicate."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import Tensor, nn

from curvalg.tensors.partial_tensors import is_distributed

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_SHARDING = "torch.distributed.fsdp"


class WeightsOnRequest(dict[str, Any]):
    """The parameters of one module, each made whole when it is read.

    Equal to what it stands for: nothing of the module counts as changed.

    Args:
        own: what it stands for.
        read: key -> the whole parameter.

    Attributes:
        own: what it stands for.
    """

    def __init__(self, own: Mapping[str, Any], read: Mapping[str, Callable[[], Tensor]]) -> None:
        super().__init__(own)
        self.own, self._read = own, read

    def __getitem__(self, key: str) -> Any:
        return self._read[key]() if key in self._read else super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        if key not in self:
            return default
        return self[key]

    def items(self) -> Any:
        return [(key, self[key]) for key in self]

    def values(self) -> Any:
        return [self[key] for key in self]

    def __eq__(self, other: object) -> bool:
        return other is self.own or other is self

    def __ne__(self, other: object) -> bool:
        return not self == other


class WithoutSharding(OrderedDict[int, Any]):
    """The hooks of one module but those that gather and reshard its parameters; equal to all of them.

    Args:
        own: all of them.
    """

    def __init__(self, own: Mapping[int, Any]) -> None:
        super().__init__((key, hook) for key, hook in own.items() if not _shards(hook))
        self._own = own

    def __eq__(self, other: object) -> bool:
        return other is self._own or other is self

    def __ne__(self, other: object) -> bool:
        return not self == other


class WithoutGathering:
    """A method that ``register_fsdp_forward_method`` has wrapped, without what gathers around it; equal to the wrapped one.

    Args:
        own: the wrapped one.
    """

    def __init__(self, own: MethodType) -> None:
        self._own = own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._own.__func__.__wrapped__(*args, **kwargs)  # type: ignore[attr-defined]

    def __eq__(self, other: object) -> bool:
        return other is self._own or other is self

    def __hash__(self) -> int:
        return hash(self._own)


def _gathers(value: Any) -> bool:
    function = getattr(value, "__func__", None)
    own = str(getattr(function, "__globals__", {}).get("__name__", ""))
    return isinstance(value, MethodType) and own.startswith(_SHARDING) and hasattr(function, "__wrapped__")


def _shards(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_SHARDING)


def fully_sharded(module: nn.Module) -> list[nn.Module]:
    """The modules that ``fully_shard`` was called on."""
    return [child for child in module.modules() if is_distributed(child, "FSDPModule")]


@contextmanager
def standing_in(
    owners: Sequence[tuple[nn.Module, Mapping[str, Callable[[], Tensor]]]], module: nn.Module
) -> Iterator[None]:
    """A context in which parameters are made whole on request, and hooks that communicate are set aside.

    Args:
        owners: the modules that own parameters, and what reads these.
        module: the model.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []

    def put(child: nn.Module, name: str, value: Any) -> None:
        before.append((child.__dict__, name, child.__dict__[name]))
        child.__dict__[name] = value

    try:
        for child, read in owners:
            put(child, "_parameters", WeightsOnRequest(child._parameters, read))
        for child in fully_sharded(module):
            for name in _HOOKS:
                put(child, name, WithoutSharding(child.__dict__[name]))
            for name in [name for name, value in child.__dict__.items() if _gathers(value)]:
                put(child, name, WithoutGathering(child.__dict__[name]))
        yield
    finally:
        for attributes, name, value in reversed(before):
            attributes[name] = value

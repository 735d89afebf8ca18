"""Whether two models compute the same function, as far as their modules, attributes, buffers and code tell."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvalg.errors import CurvalgWarning, ProblemError
from curvalg.problem.model.model import Model
from curvalg.problem.model.watch import contents

Difference = tuple[str, bool]
"""What differs, in words, and whether that is certain; otherwise it is something that cannot be compared."""

DEEPEST = 20
"""Objects within objects that are looked into."""
_OWN = frozenset(nn.Module().__dict__)
"""Attributes of every module: its parameters, buffers and children, which are compared by themselves, flags and hooks."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def differences(
    one: Model, two: Model, states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
) -> Iterator[Difference]:
    """What may make two models with the same chosen parameters compute different things.

    How a batch is handed to the model (``forward=``) is not compared: other data may be made of other parts.

    Args:
        one, two: the models.
        states: of both, all parameters and buffers by their names.
    """
    yield from _ModelComparison().between("the model", one.given, two.given)
    first, second = states
    for name in sorted(first.keys() | second.keys()):
        if name not in first or name not in second:
            yield f"{name!r} is there in one of them only", True
        elif first[name] is not second[name] and not _equal(first[name], second[name]):
            yield f"the values of {name!r} differ", True


_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, types.BuiltinFunctionType, type)


class _ModelComparison:
    """A walk through two objects at once, each pair of parts looked at once."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], Any] = {}
        """Pairs that were looked at, which are held so that their numbers stay theirs."""

    def between(self, name: str, a: Any, b: Any, depth: int = 0) -> Iterator[Difference]:
        """What differs between two objects, attribute by attribute."""
        if a is b or (id(a), id(b)) in self._seen:
            return
        self._seen[id(a), id(b)] = a, b
        if depth > DEEPEST:
            yield f"{name} nests too deeply", False
        elif isinstance(a, Tensor) and isinstance(b, Tensor):
            if not _equal(a, b):
                yield f"{name} has other values", True
        elif isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            if a.dtype != b.dtype or not np.array_equal(a, b):
                yield f"{name} has other values", True
        elif isinstance(a, nn.Module) and isinstance(b, nn.Module):
            yield from self._modules(name, a, b, depth)
        elif isinstance(a, types.FunctionType) and isinstance(b, types.FunctionType):
            yield from self._functions(name, a, b, depth)
        elif _named(type(a)) != _named(type(b)) and not _same_value(a, b):
            yield f"{name} is {_shown(a)} in one and {_shown(b)} in the other", True
        elif isinstance(a, functools.partial):
            yield from self.between(name, (a.func, a.args, a.keywords), (b.func, b.args, b.keywords), depth + 1)
        elif isinstance(a, types.MethodType):
            yield from self.between(name, (a.__func__, a.__self__), (b.__func__, b.__self__), depth + 1)
        elif isinstance(a, (dict, types.MappingProxyType)):
            if a.keys() != b.keys():
                yield f"{name} has other entries", True
                return
            for key in a:
                yield from self.between(f"{name}[{key!r}]", a[key], b[key], depth + 1)
        elif isinstance(a, (list, tuple)):
            if len(a) != len(b):
                yield f"{name} has {len(a)} entries in one and {len(b)} in the other", True
                return
            for number, (x, y) in enumerate(zip(a, b, strict=True)):
                yield from self.between(f"{name}[{number}]", x, y, depth + 1)
        elif not _same_value(a, b):
            attributes = getattr(a, "__dict__", None)
            if isinstance(a, _PLAIN):
                yield f"{name} is {_shown(a)} in one and {_shown(b)} in the other", True
            elif isinstance(attributes, dict):
                yield from self.between(name, attributes, vars(b), depth + 1)
            else:
                yield f"{name}, an object of the class {type(a).__name__}", False

    def _modules(self, name: str, a: nn.Module, b: nn.Module, depth: int) -> Iterator[Difference]:
        """What differs between two trees of modules."""
        ours, theirs = dict(a.named_modules()), dict(b.named_modules())
        for path in [*ours, *(path for path in theirs if path not in ours)]:
            label = f"{name}.{path}" if path else name
            if path not in ours or path not in theirs:
                yield f"{label} is there in one of them only", True
                continue
            one, two = ours[path], theirs[path]
            if one is two:
                continue
            if type(one) is not type(two):
                if _named(type(one)) != _named(type(two)):
                    yield f"{label} is a {type(one).__name__} in one and a {type(two).__name__} in the other", True
                    continue
                # One class that was made twice, as by running a cell of a notebook again.
                yield from self.between(f"{label}.forward", type(one).forward, type(two).forward, depth + 1)
            if one.training is not two.training:
                yield f"{label} is in training mode in one of them only", True
            for hooks in _HOOKS:
                ours_hooks, theirs_hooks = (list(getattr(module, hooks).values()) for module in (one, two))
                yield from self.between(f"{label}.{hooks}", ours_hooks, theirs_hooks, depth + 1)
            mine, others = ({k: v for k, v in vars(module).items() if k not in _OWN} for module in (one, two))
            for key in sorted(mine.keys() | others.keys()):
                if key not in mine or key not in others:
                    yield f"{label}.{key} is there in one of them only", True
                elif not isinstance(mine[key], (nn.Module, nn.Parameter)):
                    yield from self.between(f"{label}.{key}", mine[key], others[key], depth + 1)

    def _functions(self, name: str, a: types.FunctionType, b: types.FunctionType, depth: int) -> Iterator[Difference]:
        """What differs between two functions: their code, their defaults, the variables that they close over."""
        if not _same_code(a.__code__, b.__code__):
            yield f"the code of {name} differs", True
            return
        if a.__globals__ is not b.__globals__:
            yield f"{name}, from two files", False
        yield from self.between(f"a default of {name}", a.__defaults__, b.__defaults__, depth + 1)
        yield from self.between(f"a default of {name}", a.__kwdefaults__, b.__kwdefaults__, depth + 1)
        for variable, x, y in zip(a.__code__.co_freevars, a.__closure__ or (), b.__closure__ or (), strict=True):
            yield from self.between(f"{variable} of {name}", contents(x), contents(y), depth + 1)


def _same_code(a: types.CodeType, b: types.CodeType) -> bool:
    if _parts(a) != _parts(b):
        return False
    pairs = zip(a.co_consts, b.co_consts, strict=True)
    nested = types.CodeType
    return all(
        _same_code(x, y) if isinstance(x, nested) and isinstance(y, nested) else type(x) is type(y) and x == y
        for x, y in pairs
        if not (
            isinstance(x, str) and "<locals>" in x
        )  # the name of a function within, which tells where it was written
    )


def _parts(code: types.CodeType) -> tuple[Any, ...]:
    """What code is made of, without where it was written and without its constants."""
    return code.co_code, code.co_names, code.co_freevars, len(code.co_consts)


def _same_value(a: Any, b: Any) -> bool:
    try:
        return bool(a == b) or (a != a and b != b)
    except Exception:  # comparisons of other people's classes
        return False


def _equal(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _named(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def _shown(value: Any) -> str:
    """A value in a few characters."""
    return getattr(value, "__name__", None) or repr(value)[:40]


def require_same(
    model: Model, other: Model, states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]], asks: str
) -> None:
    """Raise unless two models compute the same function, as far as can be seen; warn where that cannot be told.

    Raises:
        ProblemError: they do not.
    """
    found = list(differences(model, other, states))
    cure = "make both problems of one module, as problem.with_data(...) and problem.with_inputs(...) do"
    if certain := [what for what, sure in found if sure]:
        more = f" (and {len(certain) - 1} more)" if len(certain) > 1 else ""
        raise ProblemError(
            f"{asks} have to come from a model that computes the same function, but {certain[0]}{more}; {cure}"
        )
    if found:
        warnings.warn(
            f"{asks} come from another object as model, and whether it computes the same function cannot be told by "
            f"{', '.join(what for what, _ in found[:3])}; {cure}",
            CurvalgWarning,
            stacklevel=5,
        )

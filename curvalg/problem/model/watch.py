"""Watching what is not a parameter: attributes of modules, hooks, closures, data in memory.

A model may read a float of its own, a mask, a list of scales or the options of a loss; a list of batches may grow. All of it
belongs to the state that numbers were computed at. Watched are containers (by their contents), tensors, arrays, what functions
close over and default to, and the attributes of objects and classes: of those that the user wrote, and of all others that hold
plain values only, as settings do. Comparing happens in every product, and is made of few calls: a dict that still holds the
same objects compares in C.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import enum
import functools
import pickle
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from curvalg.tensors import trees
from curvalg.tensors.bits import Bits, ManyBits, SampledBits
from curvalg.tensors.partial_tensors import is_part

MOST = 200_000
"""Places that are looked at; what lies beyond is not watched."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_INTERNAL = frozenset(("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"))
_PLAIN = (Number, str, bytes, bool, type(None), enum.Enum, torch.dtype, torch.device, torch.Size)
_CONTAINERS = (dict, list, set, collections.deque)
_DICTS = (dict, types.MappingProxyType)
_SETTINGS = (types.SimpleNamespace, argparse.Namespace)
GENERATORS = (Generator, np.random.Generator, np.random.RandomState)


class Entry:
    """A container and its former contents.

    Args:
        name: what messages call it.
        live: the container.
    """

    def __init__(self, name: str, live: Any) -> None:
        self.name, self.live, self.ignored = name, live, frozenset[Any]()
        self.copy = live.copy()

    def differences(self) -> list[str]:
        """Names of what is different now in the container."""
        if _equal(self.live, self.copy):
            return []
        if not isinstance(self.live, _DICTS):
            return [self.name]
        keys = [*self.copy, *(key for key in self.live if key not in self.copy)]
        return [f"{self.name}.{key}" for key in keys if key not in self.ignored and not self._same(key)]

    def intact(self) -> bool:
        """Whether the container has the same contents."""
        return _equal(self.live, self.copy) or (bool(self.ignored) and not self.differences())

    def _same(self, key: Any) -> bool:
        if key not in self.live or key not in self.copy:
            return False
        return _equal([self.live[key]], [self.copy[key]])

    def ignore_differences(self) -> None:
        """Accept what is different now, so that it does not count any more."""
        if isinstance(self.live, _DICTS):
            keys = [*self.copy, *(key for key in self.live if key not in self.copy)]
            self.ignored |= {key for key in keys if not self._same(key)}


class Watch:
    """Everything reachable from some roots that is watched, as it was when the watch began.

    Args:
        roots: (name, object).
        exactly: compare tensors by their bits, which takes a copy of each; else by identity and version, which writes past
            autograd (``t.data``, NumPy views) escape.
        modules: whose parameters, buffers and submodules are watched elsewhere.
        inside: classes that are looked into although they hold more than plain values.
    """

    def __init__(
        self,
        roots: Iterable[tuple[str, Any]],
        *,
        exactly: bool,
        modules: Iterable[nn.Module] = (),
        inside: tuple[type, ...] = (),
    ) -> None:
        self.entries: list[Entry] = []
        self.tensors: list[tuple[str, Any, Any, Tensor]] = []
        """(name, the container that holds it, the key there, tensor)."""
        self.generators: list[Any] = []
        self._exactly, self._inside = exactly, inside
        self._arrays: list[tuple[str, np.ndarray, np.ndarray]] = []
        self._places: list[tuple[str, Callable[[], Any], Any]] = []
        """(name, what reads the object that is there, the object): cells of closures, slots, defaults."""
        self._own = {id(module) for module in modules}
        self._seen: dict[int, Any] = {}
        todo = [(name, None, None, root) for name, root in roots]
        while todo and len(self._seen) < MOST:
            todo.extend(self._visit(*todo.pop()))
        self._seen.clear()
        self._list_entries()
        self._bits = [Bits(t) for _, _, _, t in self.tensors] if exactly else []
        self._together = ManyBits()
        self._counted = [] if exactly else [t for _, _, _, t in self.tensors if not t.is_inference()]
        self._versions = [t._version for t in self._counted]
        self._samples = (
            [] if exactly else [SampledBits(t) for _, _, _, t in self.tensors if t.is_cpu or t.is_inference()]
        )

    def _visit(self, name: str, holder: Any, key: Any, value: Any) -> Iterator[tuple[str, Any, Any, Any]]:
        if isinstance(value, (*_PLAIN, types.ModuleType)) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            if is_part(value):  # compared by the numbers of this process
                with torch.no_grad():
                    self.tensors.append((name, None, None, value.to_local()))  # type: ignore[attr-defined]
            elif value.layout == torch.strided and not value.is_meta and not value.is_nested:
                self.tensors.append((name, holder, key, value))
        elif isinstance(value, np.ndarray):
            if self._exactly and value.dtype != object:
                self._arrays.append((name, value, value.copy()))
        elif isinstance(value, GENERATORS):
            if value is not np.random.mtrand._rand and value is not torch.default_generator:  # guarded in every call
                self.generators.append(value)
        elif isinstance(value, nn.Module):
            yield from self._module(name, value)
        elif isinstance(value, _CONTAINERS):
            yield from self._container(name, value)
        elif isinstance(value, (tuple, frozenset)):
            yield from ((f"{name}[{i}]", None, None, part) for i, part in enumerate(value))
        elif isinstance(value, functools.partial):
            yield from ((f"{name}.{part}", None, None, getattr(value, part)) for part in ("func", "args", "keywords"))
        elif isinstance(value, types.MethodType):
            yield (name, None, None, value.__func__)
            yield (name, None, None, value.__self__)
        elif isinstance(value, types.FunctionType):
            yield from self._function(name, value)
        elif isinstance(value, (staticmethod, classmethod)):
            yield (name, None, None, value.__func__)
        elif isinstance(value, property):
            yield (name, None, None, value.fget)
        elif isinstance(value, type):
            yield from self._class(name, value)
        elif self._looks_inside(value):
            yield from self._object(name, value)

    def _looks_inside(self, value: Any) -> bool:
        if isinstance(value, self._inside) or (self._exactly and _is_users(type(value))):
            return True
        return _is_record(value) or trees.has_stores(value)

    def _container(
        self, name: str, value: Any, ignored: frozenset[str] = frozenset()
    ) -> Iterator[tuple[str, Any, Any, Any]]:
        self.entries.append(Entry(name, value))
        self.entries[-1].ignored = ignored
        if isinstance(value, _DICTS):
            holder = value if isinstance(value, dict) else None
            parts = [(key, part) for key, part in value.items() if key not in ignored]
            yield from ((f"{name}.{key}", holder, key, part) for key, part in parts)
        elif isinstance(value, (list, collections.deque)):
            yield from ((f"{name}[{i}]", value, i, part) for i, part in enumerate(value))

    def _module(self, name: str, module: nn.Module) -> Iterator[tuple[str, Any, Any, Any]]:
        attributes = module.__dict__
        self.entries.append(Entry(name, attributes))
        self.entries[-1].ignored = frozenset(("training",))  # watched as flags
        for kind in _HOOKS:
            if (hooks := attributes.get(kind)) is not None:
                self.entries.append(Entry(f"{name}.{kind.strip('_')}", hooks))
        inner = () if id(module) in self._own else _INTERNAL
        for key, value in attributes.items():
            if key in inner or (key not in _INTERNAL and key not in _BOOKKEEPING):
                yield (f"{name}.{key}", attributes, key, value)
        yield (f"{name}, class {type(module).__name__}", None, None, type(module))

    def _object(self, name: str, value: Any) -> Iterator[tuple[str, Any, Any, Any]]:
        if isinstance(attributes := getattr(value, "__dict__", None), dict):
            yield from self._container(name, attributes)
        for kind in type(value).__mro__:
            slots = vars(kind).get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                yield from self._place(f"{name}.{slot}", partial(getattr, value, slot, None))
        yield (f"{name}, class {type(value).__name__}", None, None, type(value))

    def _class(self, name: str, kind: type) -> Iterator[tuple[str, Any, Any, Any]]:
        """The attributes and methods of a class and its bases, as far as the user wrote them."""
        if not self._exactly:
            return
        for base in kind.__mro__:
            if _is_users(base) and (base is kind or id(base) not in self._seen):
                self._seen[id(base)] = base
                yield from self._container(name, vars(base), _PYTHONS)

    def _function(self, name: str, function: types.FunctionType) -> Iterator[tuple[str, Any, Any, Any]]:
        names = function.__code__.co_freevars
        for variable, cell in zip(names, function.__closure__ or (), strict=True):
            yield from self._place(f"{name}, variable {variable}", partial(contents, cell))
        for kind in ("__defaults__", "__kwdefaults__"):
            yield from self._place(f"{name}, defaults", partial(getattr, function, kind))
        if function.__dict__:
            yield from self._container(name, function.__dict__)

    def _place(self, name: str, read: Callable[[], Any]) -> Iterator[tuple[str, Any, Any, Any]]:
        if (value := read()) is not None:
            self._places.append((name, read, value))
            yield (name, None, None, value)

    def _list_entries(self) -> None:
        self._lives, self._copies = [entry.live for entry in self.entries], [entry.copy for entry in self.entries]

    # -- comparing ------------------------------------------------------------------------------------------------------

    def intact(self, unread: list[Tensor] | None = None) -> bool:
        """Whether nothing that is watched has changed.

        Args:
            unread: takes flags of what lies on a device, set where it changed, so that nothing waits for them here.
        """
        # All containers in one comparison, which runs in C; one by one only where something is unequal, or cannot be compared.
        if not _equal(self._lives, self._copies) and not all(entry.intact() for entry in self.entries):
            return False
        if [t._version for t in self._counted] != self._versions:
            return False
        if self._places and not all(_holds(read, value) for _, read, value in self._places):
            return False
        if self._samples and not all(sample.intact() for sample in self._samples):
            return False
        live = ((t, bits) for bits, (_, _, _, t) in zip(self._bits, self.tensors))
        if self._bits and not self._together.intact(live, unread):
            return False
        return not self._arrays or all(
            np.array_equal(live, copy, equal_nan=live.dtype.kind in "fc") for _, live, copy in self._arrays
        )

    def changed(self) -> list[str]:
        """Names of what has changed."""
        found = [name for entry in self.entries for name in entry.differences()]
        found += [name for (name, _, _, _), written in zip(self.tensors, self.written_tensors()) if written]
        found += [name for name, read, value in self._places if not _holds(read, value)]
        found += [n for n, a, b in self._arrays if not np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")]
        return list(dict.fromkeys(found))

    def written_tensors(self) -> list[bool]:
        """Whether each tensor's memory was written into."""
        if self._exactly:
            return [not bits.intact(t) for bits, (_, _, _, t) in zip(self._bits, self.tensors)]
        written = {id(t) for t, version in zip(self._counted, self._versions) if t._version != version}
        written |= {id(sample.tensor) for sample in self._samples if not sample.intact()}
        return [id(t) in written for _, _, _, t in self.tensors]

    def forgive(self) -> None:
        """Accept whatever is different now: it is changed by what is done here."""
        for entry in self.entries:
            entry.ignore_differences()
        self.entries = [entry for entry in self.entries if entry.intact()]
        self._list_entries()
        written = self.written_tensors()
        if any(written):
            left = [i for i, w in enumerate(written) if not w]
            if self._exactly:
                self._bits = [self._bits[i] for i in left]
            self.tensors = [self.tensors[i] for i in left]
            self._counted = [] if self._exactly else [t for _, _, _, t in self.tensors if not t.is_inference()]
            self._versions = [t._version for t in self._counted]
            kept = {id(t) for _, _, _, t in self.tensors}
            self._samples = [sample for sample in self._samples if id(sample.tensor) in kept]
        self._places = [(name, read, value) for name, read, value in self._places if _holds(read, value)]
        self._arrays = [(n, a, b) for n, a, b in self._arrays if np.array_equal(a, b)]

    def ignore_written(self, dicts: Iterable[Any]) -> None:
        """Accept what is different now in these dicts (by key)."""
        ids = {id(live) for live in dicts}
        for entry in self.entries:
            if id(entry.live) in ids:
                entry.ignore_differences()

    def restore_tensors(self) -> None:
        """Put back the numbers of tensors that were written into; for watches that hold copies."""
        for bits, (_, _, _, t) in zip(self._bits, self.tensors):
            if not bits.intact(t):
                with torch.no_grad():
                    t.copy_(bits.copy)


_PYTHONS = frozenset(("__slotnames__", "__annotations__", "__annotations_cache__"))
"""What Python writes on a class when an object of it is copied, or its annotations are read."""

_BOOKKEEPING = frozenset(
    key for key in nn.Module().__dict__ if key.endswith(("hooks", "hooks_with_kwargs", "hooks_always_called"))
)
"""Attributes of every module that hold hooks: those that take part in calls are watched by themselves."""


def _is_record(value: Any) -> bool:
    """Whether an object holds plain values only, as settings do."""
    if isinstance(value, _SETTINGS):
        return True
    if callable(value) and not dataclasses.is_dataclass(value):
        return False
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict):
        return False
    kinds = (*_PLAIN, *_CONTAINERS, tuple, frozenset, Tensor, np.ndarray, *GENERATORS)
    return all(isinstance(part, kinds) or callable(part) for part in attributes.values())


def _is_users(kind: type) -> bool:
    """Whether a class is none of Python's, torch's or NumPy's, whose objects change by being used."""
    return bool(kind.__flags__ & _HEAP) and kind.__module__.partition(".")[0] not in _LIBRARIES


_HEAP = 1 << 9
"""The flag of classes that are made by a class statement."""
_LIBRARIES = sys.stdlib_module_names - {"__main__"} | {"torch", "torchvision", "numpy", "scipy", "optree"}


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except Exception:  # tensors that are not the same object, or objects of other people's classes
        return False


def contents(cell: types.CellType) -> Any:
    """What a variable that a function closes over holds; None before it is assigned."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _holds(read: Callable[[], Any], value: Any) -> bool:
    now = read()
    return now is value or _equal([now], [value])


def read_generator(generator: Any) -> bytes:
    """The state of a generator of torch or NumPy."""
    if isinstance(generator, Generator):
        return generator.get_state().numpy().tobytes()
    state = generator.get_state() if isinstance(generator, np.random.RandomState) else generator.bit_generator.state
    return pickle.dumps(state)


def set_generator(generator: Any, state: bytes) -> None:
    """Put a generator back to a state that was read from it."""
    if isinstance(generator, Generator):
        generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(pickle.loads(state))
    else:
        generator.bit_generator.state = pickle.loads(state)

"""Observation of every use of the parameters while the model runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from curvalg.problem.layers.origin import Origin
from curvalg.problem.layers.torch_calls import SUMS, TABLE, UNFUSED, followed
from curvalg.problem.layers.uses import Call, Declined, ElementUse, EmbeddingUse, SpreadTableUse, Use

T = TypeVar("T")

NEAR = 1e-3
"""Largest difference between a function and what it is taken apart into, beside its largest number: a wrong one is wrong by
far more."""


class Capture(TorchFunctionMode):
    """Watches the leaves that stand for the parameters: functions of the table become uses, all others are noted.

    Tensors that only pick and arrange entries of a leaf are watched like it. Functions that hold several layers are taken
    apart; results of the model are what they are without it, up to rounding.

    Args:
        names: of the parameters, in the order of the leaves.

    Attributes:
        uses: of the parameters, in the order of the calls.
        reasons: parameter -> why one of its uses is none of these.
        spread: tables whose picked rows are the same for all rows of the batch.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = list(names)
        self._origins: dict[int, Origin] = {}
        self._tables: dict[int, tuple[EmbeddingUse, Origin]] = {}
        self.uses: list[Use] = []
        self.spread: set[str] = set()
        self.reasons: dict[str, str] = {}

    def watch(self, leaves: Sequence[Tensor]) -> Capture:
        """Watch the tensors that stand for the parameters."""
        for leaf, name in zip(leaves, self._names, strict=True):
            self._follow(self._origins, leaf, Origin(name))
        return self

    def stands_for(self, part: Tensor, whole: Tensor) -> None:
        """Watch a tensor that was made of a leaf and stands for the same parameter: whole, where the leaf is a part of it."""
        if (origin := self._origins.get(id(part))) is not None:
            self._follow(self._origins, whole, origin)

    def _follow(self, where: dict[int, T], tensor: Tensor, entry: T) -> None:
        key = id(tensor)
        where[key] = entry
        # As long as it lives no other tensor has its number; whole weights must not live on here.
        weakref.finalize(tensor, where.pop, key, None).atexit = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        found = {self._origins[id(t)].name for t in given if id(t) in self._origins}
        if found and (apart := UNFUSED.get(func)) is not None:
            try:
                return self._taken_apart(func, apart, args, kwargs)
            except Declined as reason:
                self.reasons.update({name: str(reason) for name in found - self.reasons.keys()})
                return func(*args, **kwargs)
        output = func(*args, **kwargs)
        if not found:
            return self._spread(func, args, kwargs, output) if any(id(t) in self._tables for t in given) else output
        results = [t for t in _tensors(output) if t.requires_grad and id(t) not in self._origins]
        if not results:  # a size, a detached copy, or the parameter itself
            return output
        if self._arranged(self._origins, func, args, kwargs, output):
            return output
        try:
            output, use = self._use(func, args, kwargs, output)
            self.uses.append(use)
            if isinstance(use, EmbeddingUse):
                self._follow(self._tables, output, (use, Origin("")))
        except Declined as reason:
            for name in found:
                self.reasons.setdefault(name, str(reason))
        return output

    def _taken_apart(self, func: Any, apart: Any, args: Any, kwargs: Any) -> Any:
        """What a function gives, in functions of single layers.

        Raises:
            Declined: it cannot be taken apart for these arguments, or gives something else then.
        """
        uses, reasons = len(self.uses), dict(self.reasons)
        with self:
            output = apart(*args, **kwargs)
        with torch.no_grad():
            fused = func(*args, **kwargs)
        for ours, theirs in zip(_tensors(output), _tensors(fused), strict=True):
            size = theirs.abs().max() if theirs.numel() else 0.0
            allowed = (NEAR + 16 * torch.finfo(theirs.dtype).eps) * size
            if ours.shape != theirs.shape or bool(((ours - theirs).abs() > allowed).any()):
                del self.uses[uses:]
                self.reasons = reasons
                raise Declined(f"it is used in {label(func)}")
        return output

    def _arranged(self, where: dict[int, Any], func: Any, args: Any, kwargs: Any, output: Any) -> bool:
        """Whether a function only picks and arranges the entries of one tensor, which is then watched further."""
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is None or id(first) not in where:
            return False
        known = where[id(first)]
        use, origin = known if isinstance(known, tuple) else (None, known)
        found = followed(func, origin, args, kwargs, output)
        for tensor, way in found or ():
            self._follow(where, tensor, way if use is None else (use, way))
        return found is not None

    def _spread(self, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """Note where picked rows of a table, or what they were arranged to, are added to something larger.

        Where they are the same for all rows of the batch (embedded positions), the table is used there.
        """
        rule = TABLE.get(func)
        if self._arranged(self._tables, func, args, kwargs, output) or rule is None or rule.use not in SUMS:
            return output
        values = dict(zip(rule.arguments, args, strict=False)) | kwargs
        for argument, value in values.items():
            if not isinstance(value, Tensor) or id(value) not in self._tables:
                continue
            table, picked = self._tables[id(value)]
            if value.shape == output.shape:
                if not any(t.requires_grad for t in _tensors(values) if t is not value):  # a mask
                    self._follow(self._tables, output, (table, picked))
                continue
            try:
                base, output = self._base(func, output)
                added = rule.use(Call(values, {argument: table.roles["weight"]}, output, get_gradient_edge(base)))
            except Declined:
                continue
            if isinstance(added, ElementUse):
                self.uses.append(SpreadTableUse(table, added, picked))
                if value.ndim == output.ndim and value.shape[0] == 1:
                    self.spread.add(table.roles["weight"].name)
        return output

    def _use(self, func: Any, args: Any, kwargs: Any, output: Any) -> tuple[Tensor, Use]:
        rule = TABLE.get(func)
        if rule is None or not isinstance(output, Tensor) or rule.has_more(args):
            raise Declined(f"it is used in {label(func)}")
        values = dict(zip(rule.arguments, args, strict=False)) | kwargs
        if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in _tensors(values)):
            raise Declined("it is used inside a transformation of torch.func")
        base, output = self._base(func, output)
        leaves = {
            k: self._origins[id(v)] for k, v in values.items() if isinstance(v, Tensor) and id(v) in self._origins
        }
        return output, rule.use(Call(values, leaves, output, get_gradient_edge(base)))

    @staticmethod
    def _base(func: Any, output: Tensor) -> tuple[Tensor, Tensor]:
        """The tensor whose gradient is that of the output, whatever happens to the output; and the output.

        Writing in place into a view (F.linear returns one where it has flattened its input) gives the view another
        history: the gradient then arrives at its base only.
        """
        base = output._base
        if base is None:
            return output, output
        if base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous():
            return base, output
        if getattr(func, "__name__", "").endswith("_"):
            raise Declined("it is used in an in-place operation on a view")
        output = output.clone()
        return output, output


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested arguments of a call."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def label(func: Any) -> str:
    """A function as a reader knows it; getters of attributes (x.T) are called __get__."""
    if getattr(func, "__name__", "") == "__get__":
        return f"the attribute {getattr(func.__self__, '__name__', '')}"
    return f"the function {getattr(func, '__name__', func)}"

"""Observation of every use of the parameters while the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from curvalg.problem.layers.registrations import TABLE
from curvalg.problem.layers.uses import Call, Declined, Use


class Capture(TorchFunctionMode):
    """Watches the leaves that stand for the parameters: functions of the table become uses, all others are noted.

    Results of the model are what they are without it.

    Args:
        names: of the parameters, in the order of the leaves.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = list(names)
        self._leaves: dict[int, str] = {}
        self.uses: list[Use] = []
        self.reasons: dict[str, str] = {}

    def watch(self, leaves: Sequence[Tensor]) -> Capture:
        """Watch the tensors that stand for the parameters."""
        self._leaves = {id(leaf): name for leaf, name in zip(leaves, self._names, strict=True)}
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = {self._leaves[id(t)] for t in _tensors((args, kwargs)) if id(t) in self._leaves}
        output = func(*args, **kwargs)
        if not found:
            return output
        results = [t for t in _tensors(output) if t.requires_grad and id(t) not in self._leaves]
        if not results:  # a size, a detached copy, or the parameter itself
            return output
        try:
            output, use = self._use(func, args, kwargs, output)
            self.uses.append(use)
        except Declined as reason:
            for name in found:
                self.reasons.setdefault(name, str(reason))
        return output

    def _use(self, func: Any, args: Any, kwargs: Any, output: Any) -> tuple[Tensor, Use]:
        rule = TABLE.get(func)
        if rule is None or not isinstance(output, Tensor) or len(args) > len(rule.arguments):
            raise Declined(f"it is used in {label(func)}")
        values = dict(zip(rule.arguments, args, strict=False)) | kwargs
        if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in _tensors(values)):
            raise Declined("it is used inside a transformation of torch.func")
        base, output = self._base(func, output)
        leaves = {k: self._leaves[id(v)] for k, v in values.items() if isinstance(v, Tensor) and id(v) in self._leaves}
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

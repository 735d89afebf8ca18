"""Sums over batches: the one place where they are added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvalg.tensors import trees


class BatchSum:
    """The sum of what batches give, added one after the other.

    Args:
        dtype: that floating-point numbers are added in; None: their own.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        self._dtypes: list[torch.dtype] | None = None
        self._value: Any = None
        self._ours = False

    def add(self, part: Any) -> None:
        """Add one more tensor, or pytree of tensors; None adds nothing."""
        if part is None:
            return
        if self._dtypes is None and self._dtype is not None:
            self._dtypes = [t.dtype for t in trees.tensors(part)]
        wide = self._widened(part)
        if self._value is None:
            self._value = wide
            self._ours = wide is not part and isinstance(part, Tensor)
        elif self._ours and isinstance(wide, Tensor) and wide.dtype == self._value.dtype:
            self._value.add_(wide)  # the sum is ours alone: no further buffer of its size
        else:
            self._value = trees.add(self._value, wide)
            self._ours = True

    def _widened(self, part: Any) -> Any:
        if self._dtype is None:
            return part
        return trees.tensor_map(lambda t: t.to(self._dtype) if t.is_floating_point() else t, part)

    @property
    def wide(self) -> Any:
        """The sum in the dtype that numbers are added in; None of nothing."""
        return self._value

    @property
    def value(self) -> Any:
        """The sum in the dtypes that its parts had; None of nothing."""
        return self.rounded(self._value)

    def rounded(self, wide: Any, otherwise: torch.dtype | None = None) -> Any:
        """A sum of such sums in the dtypes that the parts had; in another where nothing was added here."""
        if self._dtypes is None and self._dtype is not None and wide is not None and otherwise is not None:
            return trees.tensor_map(lambda t: t.to(otherwise) if t.is_floating_point() else t, wide)
        if self._dtypes is None or wide is None:
            return wide
        dtypes = iter(self._dtypes)
        return trees.tensor_map(lambda t: t.to(next(dtypes)), wide)

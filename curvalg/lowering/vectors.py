"""Operands of products: NumPy arrays, tensors, or dicts and lists of tensors in parameter layout; same kind out, and finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from torch import Tensor

from curvalg.distributed.sharding.tensor_parallel import Spread
from curvalg.errors import NotFiniteError, VectorError, VectorTypeError
from curvalg.problem import Layout
from curvalg.tensors.bits import all_finite
from curvalg.tensors.spaces import VectorSpace
from curvalg.tensors.trees import describe

Vector = np.ndarray | Tensor | Mapping[str, Tensor] | Sequence[Tensor]


@dataclass(frozen=True)
class Operand:
    """An operand of a product, read as columns.

    Args:
        columns: real columns (n, K) in the operator's dtype and on its device.
        restore: a result (m, K) in the kind and shape of what came in.
    """

    columns: Tensor
    restore: Callable[[Tensor], Any]


@dataclass(frozen=True)
class Space:
    """One side of an operator.

    Args:
        size: dimension.
        layout: layout of the parameters, None for outputs.
        dtype: of the operator.
        device: of the problem.
        sharded: the space of its vectors where each process holds a part of them; None: this one holds all numbers.
    """

    size: int
    layout: Layout | None
    dtype: torch.dtype
    device: torch.device
    sharded: VectorSpace | None = field(default=None, repr=False, compare=False)

    @property
    def vectors(self) -> VectorSpace:
        """The space that sums over the numbers of vectors are taken in."""
        return VectorSpace(self.size) if self.sharded is None else self.sharded

    @property
    def local(self) -> int:
        """How many numbers of a vector this process holds."""
        return self.size if self.sharded is None else self.sharded.local


def parse(x: Vector, domain: Space, codomain: Space, *, unread: bool = False) -> Operand:
    """Read an operand of an operator between two spaces.

    Args:
        x: the operand.
        domain: of the operator.
        codomain: of the operator.
        unread: leave entries on a device unread, as the product with them is looked at anyway (:func:`sized`).

    Raises:
        VectorError: wrong kind, shape, dtype or device, or entries that are not finite.
    """
    operand = _read(x, domain, codomain, unread)
    if domain.sharded is not None and len(set(found := domain.sharded.together(operand.columns.shape[1]))) > 1:
        raise VectorError(
            f"expected the parts of as many columns on all processes, got from {found[0]} to {found[1]}, "
            f"{operand.columns.shape[1]} on this one; multiply the same vectors on all of them"
        )
    return operand


def _read(x: Vector, domain: Space, codomain: Space, unread: bool) -> Operand:
    if isinstance(x, Tensor):
        return _from_tensor(x, domain, unread)
    if isinstance(x, np.ma.MaskedArray):
        raise VectorTypeError("expected numbers, got a masked array; fill the masked entries with x.filled(0)")
    if isinstance(x, (np.ndarray, np.generic)):
        return _from_numpy(np.asarray(x), domain)
    if isinstance(x, (Mapping, list, tuple)):
        return _from_tree(x, domain, codomain, unread)
    sparse = "; write x.toarray()" if issparse(x) else ""
    raise VectorTypeError(
        f"expected a NumPy array, a tensor, or a dict or list of tensors in parameter layout, got {describe(x)}{sparse}"
    )


def _require(ok: bool, domain: Space, came: str) -> None:
    if not ok:
        n, part, cure = domain.local, "", ""
        if domain.sharded is not None:
            part = f", the part of {domain.size} numbers that this process holds"
            cure = "; of a whole vector v the part is v[problem.layout.places()]"
        raise VectorError(f"expected shape ({n},) or ({n}, K){part}, got {came}{cure}")


def require_finite_operand(columns: Tensor) -> Tensor:
    """Raise VectorError for an operand with NaN or infinite entries."""
    if not all_finite(columns):
        raise VectorError("the operand has NaN or infinite entries; a product with it would have no meaning")
    return columns


def _from_tensor(x: Tensor, domain: Space, unread: bool) -> Operand:
    _require(x.ndim in (1, 2) and x.shape[0] == domain.local, domain, f"a tensor of shape {tuple(x.shape)}")
    if x.device != domain.device:
        raise VectorError(
            f"expected a tensor on {domain.device}, got one on {x.device}; move it with x.to({str(domain.device)!r})"
        )
    if x.layout != torch.strided:
        raise VectorError(f"expected a dense tensor, got layout {x.layout}; convert it with x.to_dense()")
    if x.is_complex():
        raise VectorTypeError("complex tensors are not supported; multiply real and imaginary part one after the other")
    dtype = torch.promote_types(x.dtype, domain.dtype)
    columns = x.detach().to(domain.dtype).reshape(domain.local, 1 if x.ndim == 1 else x.shape[1])
    columns = _plain(columns)
    if not unread or columns.device.type == "cpu":
        require_finite_operand(columns)
    return Operand(columns, lambda y: (y[:, 0] if x.ndim == 1 else y).to(dtype))


def _plain(x: Tensor) -> Tensor:
    # Autograd refuses tensors that were made under inference_mode.
    return x.clone() if x.is_inference() else x


def _from_numpy(x: np.ndarray, domain: Space) -> Operand:
    _require(x.ndim in (1, 2) and x.shape[0] == domain.local, domain, f"an array of shape {x.shape}")
    if x.dtype.kind not in "fiubc":
        raise VectorTypeError(f"expected a numeric array, got dtype {x.dtype}")
    own = numpy_dtype(domain.dtype)
    dtype = np.result_type(own, x.dtype)
    parts = [x.real, x.imag] if x.dtype.kind == "c" else [x]
    columns_each = 1 if x.ndim == 1 else x.shape[1]
    flat = np.concatenate([part.reshape(domain.local, columns_each) for part in parts], 1).astype(own)
    columns = require_finite_operand(torch.from_numpy(flat)).to(domain.device)

    def restore(y: Tensor) -> np.ndarray:
        result = y.cpu().numpy()
        if x.dtype.kind == "c":
            half = result.shape[1] // 2
            result = result[:, :half] + 1j * result[:, half:]
        return np.asarray((result[:, 0] if x.ndim == 1 else result).astype(dtype, copy=False))

    return Operand(columns, restore)


def first_column(x: Vector, space: Space) -> Any:
    """The first column of a vector that was parsed for a space, of its kind; a vector without columns is itself."""
    if isinstance(x, Mapping) and space.layout is not None:
        return {name: _first(t, len(space.layout.shapes[name])) for name, t in x.items()}
    if isinstance(x, (list, tuple)) and space.layout is not None and all(isinstance(t, Tensor) for t in x):
        return type(x)(_first(t, len(shape)) for t, shape in zip(x, space.layout.shapes.values(), strict=True))
    return _first(x if isinstance(x, Tensor) else np.asarray(x), 1)


def _first(t: Any, ndim: int) -> Any:
    return t[..., 0] if t.ndim > ndim else t


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """NumPy's dtype of the same numbers."""
    return torch.empty(0, dtype=dtype, device="cpu").numpy().dtype


def _from_tree(x: Mapping[str, Tensor] | Sequence[Tensor], domain: Space, codomain: Space, unread: bool) -> Operand:
    if domain.layout is None:
        raise VectorTypeError(
            f"this operator acts on outputs ({domain.size} numbers), not on parameters; pass an array or a tensor"
        )
    flat, names = domain.layout.flatten(x), domain.layout.names
    inner = _from_tensor(flat, domain, unread)

    def restore(y: Tensor) -> Any:
        result = inner.restore(y)
        if codomain.layout is None:
            return result
        given = x if isinstance(x, Mapping) else dict(zip(names, x, strict=True))
        tree = {
            name: t if (spread := Spread.like(given.get(name))) is None else spread.of(t)
            for name, t in codomain.layout.unflatten(result).items()
        }
        if isinstance(x, Mapping):
            return tree
        return tuple(tree.values()) if isinstance(x, tuple) else list(tree.values())

    return Operand(inner.columns, restore)


Measure = Callable[[Tensor], Tensor]
"""Columns -> one number, finite where all entries are (but for an overflow), found without a buffer."""


def largest(x: Tensor) -> Tensor:
    """The largest magnitude of an entry, NaN where one is."""
    if not x.numel():
        return x.new_zeros(())
    # On a CPU torch's own maximum norm takes ten times as long as both ends do.
    return torch.maximum(x.amax(), -x.amin()) if x.device.type == "cpu" else torch.linalg.vector_norm(x, torch.inf)


def measured(
    result: Tensor, operand: Tensor, unread: Sequence[Tensor], what: object, measure: Measure = torch.sum
) -> tuple[float, bool]:
    """Look at a product, at its operand and at flags by one wait for the device.

    Args:
        result: the product.
        operand: what was multiplied, of which entries on a device have not been looked at.
        unread: flags on the device.
        what: the operator, for messages.
        measure: the number to be read of a product.

    Returns:
        The number, and whether a flag was set.

    Raises:
        VectorError: the operand is not finite.
        NotFiniteError: the product is not.
    """
    if result.device.type == "cpu":
        number, flagged = measure(result).item(), False
    else:
        numbers = [measure(result), measure(operand).to(result.dtype), *(flag.to(result.dtype) for flag in unread)]
        number, given, *flags = torch.stack(numbers).tolist()
        flagged = any(flags)
        if not math.isfinite(given):
            require_finite_operand(operand)
    if not math.isfinite(number):
        require_finite(result, what)
    return number, flagged


def require_finite(result: Tensor, what: object) -> Tensor:
    """Raise NotFiniteError for a product with NaN or infinite entries."""
    if not all_finite(result):
        raise NotFiniteError(
            f"the product with {what} has NaN or infinite entries; the loss or a second derivative is not finite there "
            "(half precision overflows in double backward: use float32 or bfloat16)"
        )
    return result

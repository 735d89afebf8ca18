"""The parameters that a problem is about, and their places in a flat vector."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from curvalg.errors import ProblemError, ProblemTypeError, VectorError
from curvalg.markup import card, table
from curvalg.problem.model.sharded import require_whole
from curvalg.problem.model.snapshot import Slot
from curvalg.tensors.bits import all_finite
from curvalg.tensors.spaces import VectorSpace
from curvalg.tensors.spaces.sharded_space import Exchanger

SHOWN = 40
"""Parameters that a notebook shows of a layout."""


class Layout:
    """Names, shapes and flat positions of the chosen parameters, in the order of ``named_parameters()``.

    Args:
        parameters: name -> tensor; only shapes and dtypes are kept.

    >>> import torch
    >>> layout = Layout({"w": torch.zeros(2, 3), "b": torch.zeros(2)})
    >>> layout.slices["b"], layout.unflatten(torch.arange(8.0))["b"]
    (slice(6, 8, None), tensor([6., 7.]))
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.shapes: dict[str, torch.Size] = {name: p.shape for name, p in parameters.items()}
        self.dtypes: dict[str, torch.dtype] = {name: p.dtype for name, p in parameters.items()}
        self.sizes: list[int] = [p.numel() for p in parameters.values()]
        ends = list(itertools.accumulate(self.sizes))
        self.slices: dict[str, slice] = {
            name: slice(end - size, end) for name, end, size in zip(parameters, ends, self.sizes, strict=True)
        }
        # One dtype for all vectors: the widest of the parameters', and never below float32, in which sums are kept.
        self.dtype: torch.dtype = reduce(torch.promote_types, self.dtypes.values(), torch.float32)
        # Casting tensors that have the right dtype already costs more than all else for a small network.
        self.uniform = set(self.dtypes.values()) == {self.dtype}

    @property
    def names(self) -> list[str]:
        """Names of the parameters in flat order."""
        return list(self.shapes)

    @property
    def size(self) -> int:
        """The number of scalars, D."""
        return sum(self.sizes)

    def _repr_html_(self) -> str:
        rows = [
            [name, str(tuple(shape)), str(self.dtypes[name]).removeprefix("torch."), f"{at.start} to {at.stop}"]
            for (name, shape), at in zip(self.shapes.items(), self.slices.values(), strict=True)
        ]
        below = table(["parameter", "shape", "dtype", "places"], rows[:SHOWN])
        more = f"<div>and {len(rows) - SHOWN} more</div>" if len(rows) > SHOWN else ""
        return card("Layout", {"numbers": str(self.size), "tensors": str(len(rows))}, below, more)

    def flatten(self, tree: Mapping[str, Tensor] | Sequence[Tensor], *, leading: bool = False) -> Tensor:
        """Join tensors to a vector (D,), or a matrix (D, K) where each has a trailing column axis of length K.

        Args:
            tree: name -> tensor, or tensors in the order of ``names``.
            leading: whether each has a leading sample axis of length N in its place, as gradients of single samples have; the
                result is (N, D) then.

        Raises:
            VectorError: missing or unknown names, or shapes that do not fit.
        """
        tensors = self._ordered(tree)
        if leading:
            if short := [name for name, t in zip(self.names, tensors, strict=True) if t.ndim <= len(self.shapes[name])]:
                raise VectorError(f"expected tensors with a leading sample axis, but {', '.join(short)} have none")
            samples = {name: len(t) for name, t in zip(self.names, tensors, strict=True)}
            if len(set(samples.values())) > 1:
                raise VectorError(f"expected as many samples on the leading axis of each tensor, got {samples}")
            return self.flatten([t.movedim(0, -1) for t in tensors]).T
        columns = {tuple(t.shape[len(shape) :]) for t, shape in zip(tensors, self.shapes.values(), strict=True)}
        fits = all(t.shape[: len(shape)] == shape for t, shape in zip(tensors, self.shapes.values(), strict=True))
        if not fits or len(columns) != 1 or len(trailing := columns.pop()) > 1:
            came = {name: tuple(t.shape) for name, t in zip(self.names, tensors, strict=True)}
            expected = {name: tuple(shape) for name, shape in self.shapes.items()}
            raise VectorError(
                f"expected tensors of shapes {expected}, all with or all without one trailing column axis; got {came}. With "
                "a leading sample axis in its place pass leading=True"
            )
        flat = [t.reshape(size, *trailing) for t, size in zip(tensors, self.sizes, strict=True)]
        return torch.cat([t.to(self._common(flat)) for t in flat])

    def _common(self, tensors: Sequence[Tensor]) -> torch.dtype:
        return reduce(torch.promote_types, (t.dtype for t in tensors), self.dtype)

    def _ordered(self, tree: Mapping[str, Tensor] | Sequence[Tensor]) -> list[Tensor]:
        if isinstance(tree, Mapping):
            missing, unknown = self.shapes.keys() - tree.keys(), tree.keys() - self.shapes.keys()
            if missing or unknown:
                raise VectorError(
                    f"expected one tensor per parameter {self.names}; missing {sorted(missing)}, unknown {sorted(unknown)}"
                )
            tensors = [tree[name] for name in self.shapes]
        else:
            tensors = list(tree)
        if len(tensors) != len(self.shapes) or not all(isinstance(t, Tensor) for t in tensors):
            kinds = [type(t).__name__ for t in tensors]
            raise VectorError(f"expected {len(self.shapes)} tensors in the order {self.names}, got {kinds}")
        return tensors

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a vector (D,), or of a matrix (D, K) with the column axis kept last, in parameter shapes.

        Raises:
            VectorError: the leading axis is not D.
        """
        self._require_vector(vector)
        parts = vector.split(self.sizes)
        return {n: t.reshape((*s, *t.shape[1:])) for (n, s), t in zip(self.shapes.items(), parts, strict=True)}

    def full(self, vector: Tensor) -> Tensor | None:
        """The whole of a vector (D,) or of columns (D, K), on the CPU.

        Where processes hold parts of vectors, all call this together: the first one has the whole one, the others None.
        ``layout.whole.unflatten`` has its parameters then.

        Raises:
            VectorError: the leading axis is not D.

        >>> Layout({"w": torch.zeros(2)}).full(torch.ones(2))
        tensor([1., 1.])
        """
        self._require_vector(vector)
        return vector.detach().cpu()

    def _require_vector(self, vector: Tensor) -> None:
        if vector.ndim not in (1, 2) or vector.shape[0] != self.size:
            raise VectorError(
                f"expected a tensor of shape ({self.size},) or ({self.size}, K), got {tuple(vector.shape)}"
            )

    def unflatten_rows(self, rows: Tensor) -> dict[str, Tensor]:
        """Vectors (K, D) as one tensor (K, *shape) per parameter, views in the vectors' dtype."""
        parts = zip(self.shapes.items(), rows.split(self.sizes, 1), strict=True)
        return {name: part.reshape(rows.shape[0], *shape) for (name, shape), part in parts}

    def tangents(self, vector: Tensor) -> list[Tensor]:
        """A vector (D,) as one tangent per parameter, in the parameter's shape and dtype."""
        parts = zip(vector.split(self.sizes), self.shapes.values(), strict=True)
        tensors = [t.reshape(shape) for t, shape in parts]
        if self.uniform and vector.dtype == self.dtype:
            return tensors
        return [t.to(dtype) for t, dtype in zip(tensors, self.dtypes.values(), strict=True)]

    def gather(self, gradients: Sequence[Tensor | None], device: torch.device) -> Tensor:
        """Gradients of the parameters (None: zero) as one vector (D,)."""
        flat = [
            torch.zeros(size, dtype=self.dtype, device=device) if g is None else g.reshape(-1)
            for g, size in zip(gradients, self.sizes, strict=True)
        ]
        return torch.cat(flat if self.uniform else [t.to(self.dtype) for t in flat])

    def add_(self, total: Tensor, gradients: Sequence[Tensor | None]) -> None:
        """Add gradients (K, *shape) of the parameters (None: zero) to vectors (K, D), in place and without another vector."""
        for g, place in zip(gradients, self.slices.values(), strict=True):
            if g is not None:
                total[:, place] += g.reshape(len(total), -1)

    def space(self, exchanger: Exchanger) -> VectorSpace:
        """The space of vectors, given what sums over the processes that hold parts of them."""
        return VectorSpace(self.size)

    @property
    def whole(self) -> Layout:
        """The layout of the whole parameters, where this one is of a process's part of them."""
        return self

    def places(self) -> Tensor:
        """The place in a whole vector of each number of this process, int64 on the CPU."""
        return torch.arange(self.size, device="cpu")

    def places_in(self, name: str) -> Tensor:
        """The place in a whole parameter of each number of this process, int64 on the CPU."""
        return torch.arange(self.shapes[name].numel(), device="cpu")

    def once(self, rows: Tensor) -> Tensor:
        """Rows (K, D) whose sums over all processes count every number once."""
        return rows

    def __repr__(self) -> str:
        return f"Layout({self.size} parameters in {len(self.shapes)} tensors, {self.dtype})"


def slots(module: nn.Module, kind: Literal["_parameters", "_buffers"]) -> list[Slot]:
    """The places of the tensors of a module: one name per (module, slot), a module under two names once, tied tensors twice."""
    return [
        (f"{prefix}.{key}" if prefix else key, owner, key)
        for prefix, child in module.named_modules()
        for owner in (getattr(child, kind),)
        for key, t in owner.items()
        if t is not None
    ]


Selection = None | str | Iterable[str] | Iterable[Tensor] | Mapping[str, Tensor]


def selected(module: nn.Module, params: Selection) -> dict[str, Tensor]:
    """The chosen parameters of a module, tied ones once, in the order of ``named_parameters()``.

    Raises:
        ProblemError: a name or pattern that matches nothing, a tensor that is not the model's, nothing to choose.
    """
    every = dict(module.named_parameters(remove_duplicate=False))
    if params is None:
        chosen = {id(p) for p in every.values() if p.requires_grad}
        if not chosen:
            raise ProblemError(
                "the model has no parameter with requires_grad=True; unfreeze some, or name the parameters with params= (the "
                "order of arguments is Problem(model, loss, data))"
            )
    elif isinstance(params, Mapping):
        own = {id(p) for p in every.values()}
        foreign = [name for name, p in params.items() if id(p) not in own]
        if foreign or not params:
            came = f"{', '.join(map(str, foreign))} are of another one, or copies" if foreign else "it is empty"
            raise ProblemError(
                f"params= must hold parameters of the model itself, but {came}; pass names or glob patterns instead, such as "
                f"params={next(iter(every), 'weight')!r}"
            )
        chosen = {id(p) for p in params.values()}
    else:
        if not isinstance(params, Iterable) or isinstance(params, Tensor):
            raise ProblemTypeError(
                "params is None, names or glob patterns, parameters of the model, or a dict of these, got "
                f"{type(params).__name__}"
            )
        given: list[Any] = [params] if isinstance(params, str) else list(params)
        if not given and isinstance(params, Iterator):
            raise ProblemError(
                "params= is an iterator that gives nothing: it was used up before; pass a list, or names"
            )
        if given and all(isinstance(p, Tensor) for p in given):
            return selected(module, {f"params[{i}]": p for i, p in enumerate(given)})
        if given and all(_named(p) for p in given):
            return selected(module, dict(given))
        chosen = {id(every[name]) for name in match(given, list(every))}
    return {name: p for name, p in module.named_parameters() if id(p) in chosen}


def _named(given: Any) -> bool:
    """Whether it is one of the pairs that ``named_parameters()`` gives."""
    return isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str) and isinstance(given[1], Tensor)


def match(patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """The names that match any of the names or glob patterns, in their own order.

    Raises:
        ProblemError: a pattern that matches none.
    """
    matched: set[str] = set()
    patterns = list(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            came = "a tensor beside names" if isinstance(pattern, Tensor) else f"{type(pattern).__name__}"
            raise ProblemTypeError(f"parameters are chosen by names or glob patterns, or all by themselves; got {came}")
        hits = [name for name in names if name == pattern] or fnmatch.filter(names, pattern)
        if not hits:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else f"the parameters are {', '.join(names)}"
            raise ProblemError(f"no parameter matches {pattern!r}; {hint}")
        matched.update(hits)
    if not matched:
        raise ProblemError("expected at least one parameter name or pattern, got none")
    return [name for name in names if name in matched]


def check(parameters: Mapping[str, Tensor], *, may_be_empty: bool = False) -> dict[str, Tensor]:
    """Return the parameters, tied ones once, if curvature can be computed for all of them.

    Args:
        parameters: by name.
        may_be_empty: whether all numbers may lie elsewhere.

    Raises:
        ProblemError: complex, integer, uninitialised, sharded or empty parameters.
    """
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, p in parameters.items():
        require_whole(name, p)
        if isinstance(p, UninitializedParameter):
            raise ProblemError(f"parameter {name!r} is not initialised yet; run the model once on a batch first")
        if not isinstance(p, Tensor):
            raise ProblemError(f"expected a tensor for parameter {name!r}, got {type(p).__name__}")
        if p.is_meta:
            raise ProblemError(
                f"parameter {name!r} is on the meta device, where there are no numbers; load the model first (to_empty and "
                "load_state_dict)"
            )
        if p.is_complex():
            raise ProblemError(
                f"parameter {name!r} is complex ({p.dtype}); curvature is defined for real parameters here. Parametrise "
                "by real and imaginary parts (torch.view_as_real)"
            )
        if not p.is_floating_point():
            raise ProblemError(f"parameter {name!r} has dtype {p.dtype}; only floating-point parameters have curvature")
        unique.setdefault(id(p), (name, p))
    if not unique or not (may_be_empty or math.fsum(p.numel() for _, p in unique.values())):
        raise ProblemError("there are no parameters to compute curvature for")
    chosen = dict(unique.values())
    home(chosen)
    return chosen


def home(parameters: Mapping[str, Tensor]) -> torch.device:
    """The device that all parameters are on.

    Raises:
        ProblemError: they are on several.
    """
    names: dict[torch.device, list[str]] = {}
    for name, p in parameters.items():
        names.setdefault(p.device, []).append(name)
    if len(names) > 1:
        shown = "; ".join(
            f"{device} has {', '.join(some[:3])}" + (f" and {len(some) - 3} more" if len(some) > 3 else "")
            for device, some in names.items()
        )
        raise ProblemError(
            f"the chosen parameters lie on several devices: {shown}. Vectors are on one device: choose the parameters of one "
            f"with params={names[next(iter(names))][:1]} or a pattern, one problem for each device, or move the model to one"
        )
    return next(iter(names))


class Forms:
    """Shape and dtype that the chosen parameters had when the problem was made.

    ``module.double()`` changes the tensors themselves, so that they cannot be asked later.

    Args:
        chosen: the parameters by name.
    """

    def __init__(self, chosen: Mapping[str, Tensor]) -> None:
        self._forms = {name: _form(p) for name, p in chosen.items()}

    def checked(self, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The chosen of all live parameters.

        Raises:
            ProblemError: one is gone or has another form.
        """
        for name, form in self._forms.items():
            if name not in live:
                raise ProblemError(f"parameter {name!r} is gone; make a new Problem")
            require_whole(name, live[name])
            if (now := _form(live[name])) != form:
                raise ProblemError(
                    f"parameter {name!r} was {_shown(form)} when the Problem was made and is {_shown(now)} now; make a new "
                    "Problem"
                )
        return {name: live[name] for name in self._forms}


def _form(p: Tensor) -> tuple[torch.Size, torch.dtype]:
    return p.shape, p.dtype


def _shown(form: tuple[torch.Size, torch.dtype]) -> str:
    shape, dtype = form
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


def move(chosen: Mapping[str, Tensor], layout: Layout, direction: object, size: float) -> None:
    """Write θ − size · direction into the parameters.

    Args:
        chosen: the live parameters.
        layout: theirs.
        direction: one vector: a tensor or array (D,), or tensors by name or in order.
        size: of the step.

    Raises:
        VectorError: another shape, or entries that are not finite.
    """
    tree = isinstance(direction, Mapping) or (
        isinstance(direction, (list, tuple)) and all(isinstance(t, Tensor) for t in direction)
    )
    flat: Any = direction
    if tree:
        flat = layout.flatten(flat)
    elif not isinstance(direction, Tensor):
        flat = torch.as_tensor(flat, device="cpu")
    if flat.shape != (layout.size,) or not flat.is_floating_point():
        raise VectorError(
            f"expected a direction of {layout.size} real numbers, got {flat.dtype} of shape {tuple(flat.shape)}"
        )
    if not all_finite(flat):
        raise VectorError("the direction has entries that are not finite; nothing was moved")
    with torch.no_grad():
        for parameter, part in zip(chosen.values(), layout.unflatten(flat.detach()).values(), strict=True):
            moved = parameter.to(part.dtype) - size * part.to(parameter.device)  # before half precision rounds the step
            parameter.copy_(moved)

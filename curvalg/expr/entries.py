"""Which single numbers of parameters a sub-matrix is over."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, TypeAlias

from curvalg.errors import OptionError

if TYPE_CHECKING:
    import numpy as np

Choice: TypeAlias = "np.ndarray | slice | EllipsisType"
"""Of one parameter: a mask of its shape, numbers of its flattened entries in ascending order, a range of these, or all."""


class Entries:
    """Some numbers of some parameters, as :func:`~curvalg.restrict` takes them: hashable, picklable, and never changed.

    They lie in the order of the flat layout of the parameters, whatever the order they are given in. Two are equal where they
    were given by the same names and the same numbers, in the same way (a mask is not the list of its places); names are
    sorted.

    Args:
        choices: name -> a boolean mask of the parameter's shape; integers (k,) into the flattened parameter (row-major), each
            once; a slice of it; or ``...`` or True for all of it. What names all of it may be a glob pattern.

    Raises:
        OptionError: no mapping, or a choice of another kind, without a number in it, or with one number twice.

    >>> import numpy as np
    >>> print(Entries({"weight": np.array([[True, False], [True, True]]), "bias": ...}))
    Entries<bias, weight[3]; 32ced3>
    """

    def __init__(self, choices: Mapping[str, Any]) -> None:
        if (
            not isinstance(choices, Mapping)
            or not choices
            or not all(isinstance(name, str) and name for name in choices)
        ):
            raise OptionError(
                "entries are a mapping such as {'fc.weight': mask, 'fc.bias': ...}, from names of parameters to masks, "
                f"integers, slices or ..., got {choices!r}"
            )
        self.choices: dict[str, Choice] = {name: _choice(name, choices[name]) for name in sorted(choices)}
        words = (f"{name!r}:{_digest(choice)}" for name, choice in self.choices.items())
        self.token = hashlib.sha256("\0".join(words).encode()).hexdigest()[:32]

    @property
    def names(self) -> tuple[str, ...]:
        """Names, or patterns, of the parameters."""
        return tuple(self.choices)

    @property
    def whole(self) -> bool:
        """Whether all numbers of these parameters are chosen."""
        return all(choice is ... for choice in self.choices.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entries) and self.token == other.token

    def __hash__(self) -> int:
        return hash(self.token)

    def __repr__(self) -> str:
        shown = (f"{name}{_shown(choice)}" for name, choice in self.choices.items())
        return f"Entries<{', '.join(shown)}; {self.token[:6]}>"


def _choice(name: str, value: Any) -> Choice:
    """A choice in its own form, copied."""
    import numpy as np  # an expression without arrays does without

    if value is ... or value is True:
        return ...
    if isinstance(value, slice):
        ends = tuple(None if end is None else operator.index(end) for end in (value.start, value.stop, value.step))
        if ends[2] is not None and ends[2] < 1:
            raise OptionError(f"entries of {name!r}: a slice has a positive step, got {value}")
        return slice(*ends)
    if not all(hasattr(value, attribute) for attribute in ("ndim", "shape", "dtype")):
        raise OptionError(
            f"entries of {name!r} are a boolean mask, an integer array, a slice, or ... for all, got {type(value).__name__}"
        )
    if not any(kind in str(value.dtype) for kind in ("bool", "int")):
        raise OptionError(
            f"entries of {name!r} are a boolean mask or integers, got dtype {value.dtype}; of numbers take mask = weight != 0"
        )
    array = np.array(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
    if array.dtype == bool:
        if not array.any():
            raise OptionError(f"entries of {name!r}: the mask chooses nothing; leave the parameter out")
        return array
    if array.ndim != 1 or not array.size:
        raise OptionError(f"entries of {name!r}: integers are of shape (k,), k ≥ 1, got {array.shape}")
    numbers = np.sort(array.astype(np.int64))
    if numbers[0] < 0:
        raise OptionError(f"entries of {name!r}: integers count from 0 in the flattened parameter, got {numbers[0]}")
    if (twice := numbers[1:][numbers[1:] == numbers[:-1]]).size:
        raise OptionError(f"entries of {name!r}: each number is chosen once, but {twice[0]} is given twice")
    return numbers


def _digest(choice: Choice) -> str:
    if choice is ... or isinstance(choice, slice):
        return repr(choice)
    return hashlib.sha256(f"{choice.dtype.kind}{choice.shape}".encode() + choice.tobytes()).hexdigest()


def _shown(choice: Choice) -> str:
    if isinstance(choice, slice):
        ends = ["" if end is None else str(end) for end in (choice.start, choice.stop, choice.step)]
        return f"[{':'.join(ends if ends[2] else ends[:2])}]"
    return "" if choice is ... else f"[{choice.sum() if choice.dtype == bool else choice.size}]"


def entries_of(params: Sequence[object] | None) -> Entries | None:
    """The entries that a side of an expression is restricted to; None where these are whole parameters."""
    only = params[0] if params else None
    return only if isinstance(only, Entries) else None

"""Options of the Kronecker-factored approximations. No torch: listing the terms must not import it."""

from __future__ import annotations

from typing import Any, Literal

from curvalg import ExpressionError

Fisher = Literal["exact", "mc", "empirical"]
Approximation = Literal["expand", "reduce"]
Rest = Literal["refuse", "diagonal", "exact"]
Stats = dict[str, Any]


def check_options(label: str, **choices: tuple[object, tuple[object, ...]]) -> None:
    """Raises:
    ExpressionError: an option that is none of its choices.
    """
    for name, (value, known) in choices.items():
        if value not in known:
            raise ExpressionError(f"{label}: {name} is one of {', '.join(map(repr, known))}, got {value!r}")

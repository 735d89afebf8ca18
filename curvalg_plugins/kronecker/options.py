"""Options of the Kronecker-factored approximations. No torch: listing the terms must not import it."""

from __future__ import annotations

from typing import Any, Literal

from curvalg import OptionError

Fisher = Literal["exact", "mc", "empirical"]
Approximation = Literal["expand", "reduce"]
Rest = Literal["small", "refuse", "diagonal", "exact"]
Stats = dict[str, Any]

SMALL = 1024
"""The most numbers of a parameter without factors that gets its exact block by default."""


def check_options(label: str, **choices: tuple[object, tuple[object, ...]]) -> None:
    """Raise ExpressionError for an option that is none of its choices."""
    for name, (value, known) in choices.items():
        if value not in known:
            raise OptionError(f"{label}: {name} is one of {', '.join(map(repr, known))}, got {value!r}")


def check_draws(label: str, fisher: str, samples: object, seed: object) -> None:
    """Raise ExpressionError for numbers of draws that make no sense, or without draws."""
    for name, value, least, default in (("samples", samples, 1, 1), ("seed", seed, 0, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{label}: {name} is an integer ≥ {least}, got {value!r}")
        if fisher != "mc" and value != default:
            raise OptionError(
                f"{label}: {name} is for fisher='mc', got {name}={value!r} with fisher={fisher!r}; leave it out"
            )

"""Quantities with units: read from what people write, and written for them."""

from __future__ import annotations

import math
import re

from curvalg.errors import OptionError

_BYTES = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000 ** (i + 1) for i, prefix in enumerate("KMGTP")},
    **{f"{prefix}iB": 1024 ** (i + 1) for i, prefix in enumerate("KMGTP")},
}
_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(given: object, name: str) -> float:
    """A number of bytes: 80e9, "80e9", "80GB" or "80 GiB".

    Args:
        given: what was passed.
        name: of the option, for messages.

    Raises:
        OptionError: no positive number of bytes.

    >>> parse_bytes("80 GiB", "device_memory=") == 80 * 2**30
    True
    """
    if isinstance(given, str):
        found = _NUMBER.fullmatch(given)
        unit = None if found is None else next((u for u in _BYTES if u.lower() == found[2].lower()), None)
        value = math.nan if found is None or unit is None else float(found[1]) * _BYTES[unit]
    else:
        value = float(given) if isinstance(given, (int, float)) and not isinstance(given, bool) else math.nan
    if not (0 < value < math.inf):
        raise OptionError(f"{name} is a positive number of bytes, such as 80e9, '80GB' or '80GiB', got {given!r}")
    return value


def parse_rate(given: object, name: str) -> float | None:
    """A positive number, in units of a second; None where none is given.

    Raises:
        OptionError: no positive number.
    """
    if given is None:
        return None
    value = float(given) if isinstance(given, (int, float)) and not isinstance(given, bool) else math.nan
    if not (0 < value < math.inf):
        raise OptionError(f"{name} is a positive number, such as 2e14, got {given!r}")
    return value


def parse_count(given: object, name: str, least: int = 1) -> int:
    """A whole number.

    Raises:
        OptionError: another thing, or less than ``least``.
    """
    if isinstance(given, bool) or not isinstance(given, int) or given < least:
        raise OptionError(f"{name} is a whole number of at least {least}, got {given!r}")
    return given


def shown_bytes(nbytes: float) -> str:
    """Bytes for people, in powers of 1000.

    >>> shown_bytes(8e10), shown_bytes(512)
    ('80 GB', '512 B')
    """
    return _shown(nbytes, ("B", "kB", "MB", "GB", "TB", "PB", "EB"))


def shown_flops(flops: float) -> str:
    """Floating-point operations for people."""
    return _shown(flops, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def shown_seconds(seconds: float) -> str:
    """Seconds for people, by the unit that suits them.

    >>> shown_seconds(0.004), shown_seconds(90.0), shown_seconds(2e5)
    ('4 ms', '1.5 min', '2.31 days')
    """
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def _shown(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {units[power]}"

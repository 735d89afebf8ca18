"""The parts of a run, in order. A newcomer is one file here and its row in ``PARTS``."""

from __future__ import annotations

from benchmarks.device.parts import agreement, bits, graphs, memory, precision, streams, table, waits
from benchmarks.device.step import Part

PARTS: dict[str, Part] = {
    "agreement": agreement,
    "streams": streams,
    "waits": waits,
    "memory": memory,
    "bits": bits,
    "precision": precision,
    "graphs": graphs,
    "table": table,
}
"""Modules with ``steps(place)``."""


def says(name: str) -> str:
    """What a part is about, in a line."""
    return str(PARTS[name].__doc__).splitlines()[0] if name in PARTS else "of another version"

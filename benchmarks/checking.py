"""Values are compared before anything is timed: a fast wrong answer is not an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Verdict = Literal["agrees", "differs by definition", "differs by chance", "wrong", "disagrees"]
"""``wrong``: the referee, an independent computation, sides with the others. ``disagrees``: nobody knows who is right."""


@dataclass(frozen=True)
class Check:
    """What comparing one contestant gave.

    Args:
        difference: relative, to the first contestant; to the referee for "wrong".
        verdict: in a word.
        note: in a sentence; empty where they agree.
    """

    difference: float
    verdict: Verdict
    note: str = ""


def distance(value: Tensor, reference: Tensor) -> float:
    """‖value − reference‖ / ‖reference‖; infinite for shapes that differ and values that are not numbers."""
    if value.shape != reference.shape:
        return float("inf")
    value, reference = (
        value.detach().cpu().double(),
        reference.detach().cpu().double(),
    )  # SciPy's answers are on the host
    off = float((value - reference).norm() / reference.norm().clamp_min(1e-300))
    return off if off == off else float("inf")


def compare(
    values: Mapping[str, Tensor],
    tolerance: float,
    differences: Mapping[str, str | None],
    referee: Callable[[], Tensor] | None = None,
    *,
    random: bool = False,
) -> dict[str, Check]:
    """Each contestant against the first; where they disagree, both against the referee.

    Args:
        values: by contestant.
        tolerance: relative distance within which they agree.
        differences: how a contestant's matrix differs by definition.
        referee: an independent computation, run only if needed.
        random: whether the values are estimates.
    """
    checks: dict[str, Check] = {}
    reference = next(iter(values), None)
    for label, value in values.items():
        off = distance(value, values[reference])  # type: ignore[index]
        said = differences.get(label)
        if off <= tolerance:
            checks[label] = Check(off, "agrees")
        elif said is not None:
            checks[label] = Check(off, "differs by definition", f"{label} {said}")
        elif random:
            checks[label] = Check(off, "differs by chance", f"{label} is {100 * off:.2g} % away from {reference}")
        elif referee is None:
            checks[label] = Check(off, "disagrees", f"{label} is {100 * off:.2g} % away from {reference}")
        else:
            truth = referee()
            for name in (reference, label):
                away = distance(values[name], truth)  # type: ignore[index]
                if away > tolerance:
                    note = f"{name} is off by {100 * away:.2g} % against an independent computation"
                    checks[name] = Check(away, "wrong", note)  # type: ignore[index]
            # Within the tolerance of the truth both, but not of each other.
            checks.setdefault(label, Check(off, "agrees"))
    return checks

"""What is known of a matrix: three-valued facts, and the facts of a loss that they may depend on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Tri = bool | None
"""True, False, or None for "not known"."""


@dataclass(frozen=True)
class Facts:
    """Facts about a square matrix, each True, False or None (unknown).

    ``positive_definite`` implies ``psd`` implies ``symmetric``; what is implied is filled in.

    Args:
        symmetric: A = Aᵀ.
        psd: symmetric, and xᵀAx ≥ 0 for all x.
        positive_definite: symmetric, and xᵀAx > 0 for all x ≠ 0.

    >>> Facts(positive_definite=True)
    Facts(symmetric=True, psd=True, positive_definite=True)
    >>> Facts(symmetric=False)
    Facts(symmetric=False, psd=False, positive_definite=False)
    """

    symmetric: Tri = None
    psd: Tri = None
    positive_definite: Tri = None

    def __post_init__(self) -> None:
        psd = True if self.positive_definite else self.psd
        symmetric = True if psd else self.symmetric
        psd = False if symmetric is False else psd
        definite = False if psd is False else self.positive_definite
        object.__setattr__(self, "symmetric", symmetric)
        object.__setattr__(self, "psd", psd)
        object.__setattr__(self, "positive_definite", definite)


@dataclass(frozen=True)
class LossFacts:
    """Facts about a loss ℓ(z, y) that decide the facts of curvature terms.

    Args:
        name: the loss's name, for messages.
        convex: whether ℓ is convex in the output z (then the GGN is positive semi-definite).
        likelihood: whether ℓ is the negative logarithm of a probability of y (then a Fisher matrix exists).
        fisher_is_ggn: whether that Fisher matrix equals the GGN.
        classes: whether the output has a class axis.
    """

    name: str
    convex: Tri = None
    likelihood: bool = False
    fisher_is_ggn: bool = False
    classes: bool = False


def all_of(values: Iterable[Tri]) -> Tri:
    """Conjunction of three-valued facts: False if one is False, else None if one is unknown, else True."""
    known = list(values)
    if any(value is False for value in known):
        return False
    return None if any(value is None for value in known) else True

"""What is known of a matrix: three-valued facts, and the facts of a loss that they may depend on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from curvalg.errors import LossError

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
        of_output: whether ℓ compares the output with y; False where the output is the loss already, as of a model that returns
            it, so that there is no Jacobian of predictions to make Gauss-Newton matrices of.
        per_sample: whether every sample has a loss of its own; False where only batches have, so that there are no gradients
            of samples to make covariances of.
    """

    name: str
    convex: Tri = None
    likelihood: bool = False
    fisher_is_ggn: bool = False
    classes: bool = False
    of_output: bool = True
    per_sample: bool = True

    def without_output(self, what: str) -> LossError:
        """The error for what needs an output that the loss is a function of.

        Args:
            what: what needs it, in words.
        """
        return LossError(
            f"{what} needs the output that the loss is a function of, but {self.name} is all that the model gives. Pass model "
            "and loss apart: a loss of output and target, with forward= and target= (task= for a Hugging Face model)"
        )

    def without_samples(self, what: str) -> LossError:
        """The error for what needs a loss of every sample.

        Args:
            what: what needs it, in words.
        """
        return LossError(
            f"{what} needs the gradient of every sample, but {self.name} is known of whole batches alone. Give batches of one "
            "row, such as DataLoader(data, batch_size=1)"
        )


def all_of(values: Iterable[Tri]) -> Tri:
    """Conjunction of three-valued facts: False if one is False, else None if one is unknown, else True."""
    known = list(values)
    if any(value is False for value in known):
        return False
    return None if any(value is None for value in known) else True

"""What scores may be wrong by, where products of queries are held as low-rank factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from curvalg.errors import OptionError


@dataclass(frozen=True)
class RankError:
    """Errors of scores ⟨∇cₙ, A v⟩ whose products A v are held, layer by layer, as their best approximations of some rank.

    With Eₗ what is missing of A v in layer l, and gₙₗ the gradient of sample n there, the error of a score is Σₗ ⟨gₙₗ, Eₗ⟩, and
    at most Σₗ ‖Eₗ‖ ‖gₙₗ‖, apart from rounding. Layers whose parameters are vectors that multiply elementwise are exact and have
    no part in it.

    Args:
        rank: r, of the factors.
        discarded: name of a layer -> Frobenius norms ‖Eₗ‖ of what is missing of each query (Q,).
        norms: name of a layer -> ‖gₙₗ‖ of each training sample (N,); by position of the shares of positions, (N, T).
    """

    rank: int
    discarded: Mapping[str, Tensor] = field(repr=False)
    norms: Mapping[str, Tensor] = field(repr=False)

    @property
    def total(self) -> Tensor:
        """Frobenius norms of what is missing of each query in all layers together (Q,)."""
        return reduce(torch.hypot, self.discarded.values())

    def bound_by_layer(self) -> dict[str, Tensor]:
        """What scores by layer are wrong by at most, apart from rounding: name -> (Q, N), or by position (Q, N, T)."""
        return dict(self._bounds())

    def bound(self) -> Tensor:
        """What scores are wrong by at most, apart from rounding: (Q, N), or by position (Q, N, T).

        Raises:
            OptionError: layers have different numbers of positions.
        """
        if len({norms.shape for norms in self.norms.values()}) > 1:
            raise OptionError("layers have different numbers of positions, and scores by layer: take bound_by_layer()")
        return torch.stack([part for _, part in self._bounds()]).sum(0)

    def bound_of(self, samples: Tensor) -> Tensor:
        """What the scores of chosen samples are wrong by at most, such as those of ``topk.largest_samples``.

        Args:
            samples: numbers of training samples for each query (Q, k).

        Returns:
            (Q, k); with by="position" it is (Q, k, T).
        """
        return torch.stack([_outer(self.discarded[name], norms[samples]) for name, norms in self.norms.items()]).sum(0)

    def _bounds(self) -> Iterator[tuple[str, Tensor]]:
        for name, norms in self.norms.items():
            yield name, _outer(self.discarded[name], norms[None])


def _outer(discarded: Tensor, norms: Tensor) -> Tensor:
    return discarded.reshape(-1, *[1] * (norms.ndim - 1)) * norms

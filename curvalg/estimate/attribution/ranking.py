"""The largest and the smallest scores of each query, kept while the scores of all samples pass by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvalg.errors import OptionError
from curvalg.estimate.attribution.ranking_picture import draw
from curvalg.estimate.request import require_count


@dataclass(frozen=True)
class Ranking:
    """The samples of the largest and of the smallest scores of each query.

    Args:
        largest: the k largest scores, falling (Q, k).
        largest_samples: numbers of their samples (Q, k).
        smallest: the k smallest scores, rising (Q, k).
        smallest_samples: numbers of their samples (Q, k).
    """

    largest: Tensor
    largest_samples: Tensor
    smallest: Tensor
    smallest_samples: Tensor

    def plot(self, ax: Any = None, *, query: int = 0, count: int = 5, samples: Any = None) -> Any:
        """Draw the most helpful and the most harmful samples of a query as bars, and return the matplotlib axes.

        Args:
            ax: matplotlib axes; new ones by default.
            query: number of the query.
            count: samples on either side, of those that were kept.
            samples: what shows a sample by its number, such as the list of the training texts, or the tensor of the training
                images: texts (of which the first letters are shown) or pictures (H, W), (C, H, W) or (H, W, C), each drawn from
                its darkest to its brightest number.

        Raises:
            OptionError: a number that is out of range, or samples of another kind.
        """
        require_count(count, "count")
        if isinstance(query, bool) or not isinstance(query, int) or not 0 <= query < len(self.largest):
            raise OptionError(f"query is a number from 0 to {len(self.largest) - 1}, got {query!r}")
        found: dict[int, float] = {}  # by sample: with few of them, one may be on both sides
        for values, numbers in ((self.largest, self.largest_samples), (self.smallest, self.smallest_samples)):
            found |= dict(zip(numbers[query, :count].tolist(), values[query, :count].tolist(), strict=True))
        shown = sorted(found, key=lambda number: (-found[number], number))
        ax = draw(ax, [found[number] for number in shown], shown, samples)
        ax.set_title(f"query {query}", loc="left")
        return ax

    @property
    def sides(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All four, in their order."""
        return self.largest, self.largest_samples, self.smallest, self.smallest_samples

    def taken(self, order: Tensor) -> Ranking:
        """The queries of some numbers."""
        return Ranking(
            self.largest[order], self.largest_samples[order], self.smallest[order], self.smallest_samples[order]
        )


def ranked(scores: Tensor, start: int, k: int, before: Ranking | None) -> Ranking:
    """The extreme scores of some samples and those before them; of equal scores the first sample counts.

    Args:
        scores: (Q, n).
        start: number of the first sample.
        k: how many on either side.
        before: of the samples before.
    """
    samples = torch.arange(start, start + scores.shape[1], device=scores.device).expand(scores.shape)
    now = Ranking(scores, samples, scores, samples)
    return joined([now] if before is None else [before, now], k)


def joined(rankings: Sequence[Ranking], k: int) -> Ranking:
    """The extremes among those of several parts of the samples; of equal scores the sample that comes first counts.

    Args:
        rankings: of the parts, in the order of the samples.
        k: how many on either side.
    """
    sides = [
        [(r.largest, r.largest_samples) for r in rankings],
        [(r.smallest, r.smallest_samples) for r in rankings],
    ]
    found = []
    for side, falling in zip(sides, (True, False), strict=True):
        values, numbers = (torch.cat(parts, 1) for parts in zip(*side, strict=True))
        order = values.argsort(dim=1, descending=falling, stable=True)[:, :k]
        found += [values.gather(1, order), numbers.gather(1, order)]
    return Ranking(*found)

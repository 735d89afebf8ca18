"""Scores of training samples for queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvalg.estimate.attribution.rank_error import RankError
from curvalg.estimate.attribution.ranking import Ranking, ranked
from curvalg.estimate.request import require_count
from curvalg.estimate.result import Result


@dataclass(frozen=True, kw_only=True, repr=False)
class InfluenceScores(Result):
    """Scores of training samples for queries, of :func:`~curvalg.estimate.influence`.

    Args:
        scores: (Q, N); by layer, a dict of such; by position, (Q, N, T), or a dict of such by layer where layers see different
            numbers of positions T; None where only extremes were kept. Of an interrupted run those of the first queries.
        topk: the extremes of each query, where they were asked for.
        iterations: of the solve for each query (Q,); None where the operator needs no iterations.
        residuals: ‖b − A x‖ of the solve for each query (Q,), recomputed; None likewise.
        error: what scores may be wrong by, with ``query_rank``; None where they are exact.
    """

    scores: Tensor | Mapping[str, Tensor] | None
    topk: Ranking | None = None
    iterations: Tensor | None = None
    residuals: Tensor | None = None
    error: RankError | None = None

    @property
    def findings(self) -> dict[str, str]:
        if isinstance(self.scores, Mapping):
            shapes = {name: tuple(scores.shape) for name, scores in self.scores.items()}
            found = {"scores": f"{len(shapes)} layers, {next(iter(shapes.values()), ())} each"}
        else:
            found = {} if self.scores is None else {"scores": " x ".join(map(str, self.scores.shape))}
        if self.topk is not None:
            found["extremes"] = f"{self.topk.largest.shape[1]} of each of {len(self.topk.largest)} queries"
        if self.residuals is not None and self.residuals.numel():
            found["residuals"] = f"≤ {float(self.residuals.max()):.1g}"
        return found

    def plot(self, ax: Any = None, *, query: int = 0, count: int = 5, samples: Any = None) -> Any:
        """Draw the most helpful and the most harmful samples of a query as bars, and return the matplotlib axes.

        Scores by layer or by position are added up.

        Args:
            ax, query, count, samples: as of :meth:`curvalg.estimate.Ranking.plot`.

        Raises:
            OptionError: a number that is out of range, or samples of another kind.

        >>> import matplotlib as mpl
        >>> mpl.use("Agg")
        >>> import torch
        >>> from curvalg import Identity, Problem, registry
        >>> from curvalg.estimate import influence
        >>> problem = Problem(torch.nn.Linear(3, 1), torch.nn.MSELoss(), (torch.randn(6, 3), torch.randn(6, 1)))
        >>> axes = influence((1.0 * Identity).lower(problem)).plot(query=2, count=2, samples=list("abcdef"))
        >>> len(axes.patches), axes.get_title(loc="left")
        (4, 'query 2')
        """
        ranking = self.topk
        if ranking is None:
            assert self.scores is not None
            parts = self.scores.values() if isinstance(self.scores, Mapping) else [self.scores]
            total = torch.stack([part if part.ndim == 2 else part.sum(2) for part in parts]).sum(0)
            ranking = ranked(total, 0, require_count(count, "count"), None)
        return ranking.plot(ax, query=query, count=count, samples=samples)


@dataclass(frozen=True)
class ScoreBatch:
    """Scores of some training samples for some queries, of :func:`~curvalg.estimate.influence_stream`.

    Args:
        queries: numbers of the queries, in the order of their data (P,).
        samples: numbers of the training samples, one after the other.
        scores: (P, n); by layer, a dict of such; by position, (P, n, T), or a dict of such by layer.
        error: what they may be wrong by, with ``query_rank``.
    """

    queries: Tensor
    samples: slice
    scores: Tensor | Mapping[str, Tensor]
    error: RankError | None = None

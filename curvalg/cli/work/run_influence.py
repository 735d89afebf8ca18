"""The command ``curvalg influence``: the training samples that help and harm each query most."""

from __future__ import annotations

import json
from collections.abc import Iterator

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from curvalg.estimate import InfluenceScores
from curvalg.lowering import CurvatureOperator

MOST = 20
"""Queries in the table."""


def sides(found: InfluenceScores) -> Iterator[tuple[list[tuple[int, float]], list[tuple[int, float]]]]:
    """Pairs (sample, score) of each query: those of the largest scores, falling, and of the smallest, rising."""
    ranking = found.topk
    assert ranking is not None
    for row in range(len(ranking.largest)):
        yield (
            _pairs(ranking.largest_samples[row], ranking.largest[row]),
            _pairs(ranking.smallest_samples[row], ranking.smallest[row]),
        )


def _pairs(samples: Tensor, scores: Tensor) -> list[tuple[int, float]]:
    return list(zip(samples.tolist(), scores.tolist(), strict=True))


def table(op: CurvatureOperator, found: InfluenceScores, problem: str, queries: str) -> Group:
    """The samples as a table for people, some rows for each query."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for column in ("query", "helps: sample", "score", "harms: sample", "score"):
        shown.add_column(column, justify="right")
    every = list(sides(found))
    for number, (largest, smallest) in enumerate(every[:MOST]):
        for rank, ((helps, most), (harms, least)) in enumerate(zip(largest, smallest, strict=True)):
            shown.add_row("" if rank else str(number), str(helps), f"{most:.4g}", str(harms), f"{least:.4g}")
    title = Text(f"influence by {op.expr} of {problem} on {queries}, {len(every)} queries", style="bold")
    rest = len(every) - MOST
    more = [Text(f"and {rest} more queries; --json and --out have all", style="dim")] if rest > 0 else []
    return Group(title, Text(), shown, Text(), *more, Text(found.cost, style="dim"))


def as_json(op: CurvatureOperator, found: InfluenceScores, *, problem: str, queries: str) -> str:
    """The samples for programs."""
    record = {
        "expression": str(op.expr),
        "problem": problem,
        "queries": queries,
        "scores": [
            {
                side: [{"sample": n, "score": score} for n, score in pairs]
                for side, pairs in zip(("largest", "smallest"), both)
            }
            for both in sides(found)
        ],
        "method": found.method,
        "products": found.products,
        "seconds": found.seconds,
        "converged": found.converged,
        "partial": found.partial,
    }
    return json.dumps(record, indent=2)

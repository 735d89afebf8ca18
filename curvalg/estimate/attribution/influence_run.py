"""Scores as a resumable run: a step is some queries against all training samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from curvalg.distributed.group import Group, group_of
from curvalg.errors import ProblemError
from curvalg.estimate.attribution.influence_scores import ScoreBatch
from curvalg.estimate.attribution.query_scores import By, Contraction, QueryGradients, TrainingScores
from curvalg.estimate.attribution.ranking import Ranking, joined, ranked
from curvalg.estimate.attribution.sample_gradients import samples_before
from curvalg.lowering import CurvatureOperator
from curvalg.problem import Problem, Snapshot
from curvalg.problem.batch import lazy
from curvalg.runs.run_state import Options, State, is_count
from curvalg.solve import SolveResult

Part = TypeVar("Part")
SCORES = "scores"
LAYER = "scores of "
DISCARDED = "discarded of "
NORMS = "norms of "
SIDES = ("largest", "largest samples", "smallest", "smallest samples")


class InfluenceRun:
    """The scores of all training samples for the samples of a problem.

    Args:
        op: an operator on all parameters.
        queries: the problem whose samples ask.
        snapshot: its state.
        by: what scores are of.
        topk: how many extremes of each query are kept; None: all scores.
        batch: queries at a time.
        rank: of the factors that are held of each product; None: products are held as they are.
    """

    name = "influence"

    def __init__(
        self,
        op: CurvatureOperator,
        queries: Problem,
        snapshot: Snapshot,
        by: By,
        topk: int | None,
        batch: int,
        rank: int | None,
    ) -> None:
        self.op, self.problem, self.snapshot = op, queries, snapshot
        self.by, self.topk = by, topk
        self.group = group_of(op, queries)
        self._contraction = Contraction(op, batch, by == "position", rank, self.group)
        self._chunks: Iterator[QueryGradients] | None = None
        self._at, self._next = -1, None  # type: tuple[int, QueryGradients | None]

    @property
    def options(self) -> Options:
        """Everything that decides the result, except the operator."""
        given: Options = {"by": self.by, "topk": self.topk, "query_batch": self._contraction.batch}
        return given if self.rank is None else {**given, "query_rank": self.rank}

    @property
    def rank(self) -> int | None:
        """The rank of the factors that are held of each product."""
        return self._contraction.rank

    def stream(self) -> Iterator[ScoreBatch]:
        """Some scores after the others, without keeping any; of several processes, those of all for one batch of each."""
        number = 0
        while (chunk := self._chunk(number)) is not None:
            before, parts = self._before, self._against(chunk)
            while any(found := self._of_each(self._shown(chunk, next(parts, None), before))):
                yield from (part for part in found if part is not None)
            number += 1

    def _of_each(self, own: ScoreBatch | None) -> list[ScoreBatch | None]:
        """A part of each process, None of those that have no more."""
        return [self._training_group.of(rank, own) for rank in range(self._training_group.size)]

    def _shown(self, chunk: QueryGradients, part: TrainingScores | None, before: int) -> ScoreBatch | None:
        if part is None:
            return None
        samples = slice(before + part.start, before + part.start + part.count)
        return ScoreBatch(chunk.numbers, samples, part.shown(self.by), part.error)

    @property
    def _training_group(self) -> Group:
        """The processes that share the training samples."""
        return self.op.problem.group

    @lazy
    def _before(self) -> int:
        """The training samples of the processes before this one."""
        return samples_before(self.op.problem, self.op.snapshot)

    # -- as an algorithm ------------------------------------------------------------------------------------------------

    def start(self) -> State:
        return State({}, {"products": 0, "chunks": 0})

    def done(self, state: State) -> bool:
        return self._chunk(state.count("chunks")) is None

    def expected(self, state: State) -> int:
        return max(state.products, self.problem.totals.rows)

    def step(self, state: State) -> State:
        chunk = self._chunk(state.count("chunks"))
        assert chunk is not None
        found = self._of_chunk(chunk) | {"queries": chunk.numbers}
        if (solve := _last(self.op)) is not None:
            found |= {"iterations": solve.iterations.cpu(), "residuals": solve.residual}
        if not state.tensors:
            return State(found, self._numbers(state, chunk))
        fixed = {name: t for name, t in state.tensors.items() if name.startswith(NORMS)}
        more = {name: torch.cat([state.tensors[name], t]) for name, t in found.items() if name not in fixed}
        return State(more | fixed, self._numbers(state, chunk))

    def _numbers(self, state: State, chunk: QueryGradients) -> Options:
        return {"products": state.products + len(chunk), "chunks": state.count("chunks") + 1}

    def _of_chunk(self, chunk: QueryGradients) -> dict[str, Tensor]:
        ranking: Ranking | None = None
        found: dict[str, list[Tensor]] = {}
        norms: dict[str, list[Tensor]] = {}
        products = self._products(chunk)
        before = 0 if self.topk is None else self._before
        for part in self._scores(products):
            if part.error is not None:
                for name, t in part.error.norms.items():
                    norms.setdefault(NORMS + name, []).append(t)
            shown = part.shown(self.by)
            if self.topk is not None:
                assert isinstance(shown, Tensor)
                ranking = ranked(shown, before + part.start, self.topk, ranking)
                continue
            own = {SCORES: shown} if isinstance(shown, Tensor) else {LAYER + name: t for name, t in shown.items()}
            if found:
                _require_same_positions(
                    [_positions(own), _positions({name: parts[0] for name, parts in found.items()})]
                )
            for name, scores in own.items():
                found.setdefault(name, []).append(scores)
        discarded = self._contraction.discarded(products) or {}
        error = {DISCARDED + name: t for name, t in discarded.items()}
        error |= self._whole({name: torch.cat(parts) for name, parts in norms.items()}, 0)
        if self.topk is not None:
            return dict(zip(SIDES, self._of_all(ranking, self.topk), strict=True)) | error
        return self._whole({name: torch.cat(parts, 1) for name, parts in found.items()}, 1) | error

    def _whole(self, own: dict[str, Tensor], dim: int) -> dict[str, Tensor]:
        """Numbers of the training samples of all processes, in the order of the data."""
        group = self._training_group
        if group.alone:
            return own
        every = [shapes for shapes in group.objects(_positions(own, dim)) if shapes]
        _require_same_positions(every)
        names = every[0] if every else {}
        return {name: group.rows(own.get(name), dim) for name in names}

    def _of_all(self, own: Ranking | None, topk: int) -> tuple[Tensor, ...]:
        """The extremes among the training samples of all processes."""
        if self._training_group.alone:
            assert own is not None  # there are data
            return own.sides
        sides = (None,) * 4 if own is None else own.sides
        every = [self._training_group.rows(side, 1) for side in sides]
        return joined([Ranking(*every)], topk).sides

    def axes(self, state: State) -> Mapping[str, int]:
        """Nothing is a vector: scores are of samples, which a process has whole."""
        return {}

    def fits(self, state: State) -> bool:
        numbers, tensors = state.numbers, state.tensors
        if numbers.keys() != {"products", "chunks"} or not all(map(is_count, numbers.values())):
            return False
        if not state.count("chunks"):
            return not tensors
        known = {*SIDES} if self.topk is not None else {name for name in tensors if name.startswith(SCORES)}
        norms = {name for name in tensors if name.startswith(NORMS)}
        discarded = {DISCARDED + name.removeprefix(NORMS) for name in norms}
        if (self.rank is None) != (not norms) or not discarded <= tensors.keys():
            return False
        more = tensors.keys() - known - norms - discarded - {"queries"}
        lengths = {len(t) for name, t in tensors.items() if name not in norms}
        return bool(
            known and known | {"queries"} <= tensors.keys() and more <= {"iterations", "residuals"}
        ) and lengths == {state.products}

    # -- what steps are made of -----------------------------------------------------------------------------------------

    def _against(self, chunk: QueryGradients) -> Iterator[TrainingScores]:
        return self._scores(self._products(chunk))

    def _products(self, chunk: QueryGradients) -> list[Any]:
        with self.op.problem.differentiating():
            return self._contraction.products(chunk)

    def _scores(self, products: list[Any]) -> Iterator[TrainingScores]:
        return _inside(self.op.problem, self._contraction.scores(products))

    def _chunk(self, number: int) -> QueryGradients | None:
        """The queries of a step, or None after the last."""
        if self._chunks is None or number < self._at:
            pieces = self._contraction.queries(self.problem, self.snapshot)
            self._chunks, self._at = _inside(self.problem, pieces), -1
        while self._at < number:
            self._next, self._at = next(self._chunks, None), self._at + 1
        return self._next


def _positions(numbers: dict[str, Tensor], samples: int = 1) -> dict[str, torch.Size]:
    """The numbers of positions that scores (Q, n, T) are of, by what they are scores of; samples are along some axis."""
    return {name: t.shape[samples + 1 :] for name, t in numbers.items()}


def _require_same_positions(every: Sequence[dict[str, torch.Size]]) -> None:
    """Raise where scores of several batches are of different numbers of positions.

    Raises:
        ProblemError: they are.
    """
    if any(one != every[0] for one in every):
        raise ProblemError(
            "by='position': batches of the training data have rows of different numbers of positions; pad them to one "
            "length, take influence_stream, or pass by='total'"
        )


def _inside(problem: Problem, parts: Iterator[Part]) -> Iterator[Part]:
    """Parts that are made while the problem differentiates, and handed out after."""
    while True:
        with problem.differentiating():
            try:
                part = next(parts)
            except StopIteration:
                return
        yield part


def _last(op: CurvatureOperator) -> SolveResult | None:
    """The report of the last solve, of an operator that solves by iterations."""
    return op.last_solve if any(node.solver.iterative for node in op._inverses()) else None

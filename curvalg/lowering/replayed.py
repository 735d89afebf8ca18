"""Products of a plan replayed as CUDA graphs, once they have proved themselves."""

from __future__ import annotations

import math
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from curvalg.errors import CurvalgError
from curvalg.lowering.lines import indent
from curvalg.problem import Problem, Snapshot
from curvalg.problem.kept.race import Candidate, Race
from curvalg.problem.kept.reads import Reads
from curvalg.tensors.cuda_graph import CudaGraph, capturing

READY = 3
"""Products of a width, all from the same memory, after which it is captured: choices have been made by then."""
FASTER = 1 / 0.9
"""How many times as long a replay is counted: its memory has to be worth it."""


class Repeatable(Protocol):
    """A matrix whose products may be the same kernels each time."""

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        """The product with x (n, K)."""
        ...

    def dense(self, snapshot: Snapshot) -> Tensor | None:
        """The matrix, where there is a cheaper way than products with unit vectors."""
        ...

    def reads(self, snapshot: Snapshot, columns: int) -> Reads | str:
        """What products with so many columns read from kept memory, or why they are not the same kernels each time."""
        ...

    def lines(self, snapshot: Snapshot) -> list[str]:
        """The plan for people; the first line names it."""
        ...


class CapturedProduct:
    """The products of one plan with operands of one width, at one snapshot: counted, then captured and replayed.

    Args:
        race: eager (False) against replayed (True).
    """

    def __init__(self, race: Race[bool]) -> None:
        self.race = race
        self.nbytes = 0
        self.reads: Reads | None = None
        self.count = 0
        self.graph: CudaGraph | None = None
        self.declined: str | None = None

    def drop(self) -> None:
        """Release the graph; products are eager until they are captured again."""
        self.graph, self.reads, self.nbytes, self.count = None, None, 0, 0

    def seen(self, reads: Reads) -> bool:
        """Count a product that read some memory; whether it is time to capture."""
        self.count = self.count + 1 if self.reads is not None and self.reads.same(reads) else 1
        self.reads = reads
        return self.count >= READY

    def line(self, width: int) -> str | None:
        """What became of it, for people."""
        columns = "1 column" if width == 1 else f"{width} columns"
        if self.graph is not None:
            times = {("replayed" if way else "eager"): s for way, s in self.race.seconds.items()}
            without = "as chosen before" if self.race.recalled else "as asked for"
            shown = ", ".join(f"{way} {1e3 * s:.2g} ms" for way, s in times.items()) or without
            return f"{columns}: a CUDA graph is replayed ({shown}; {self.nbytes / 2**20:.3g} MiB)"
        return f"{columns}: no CUDA graph, {self.declined}" if self.declined else None


class Replayed:
    """A plan whose products are captured as CUDA graphs where that is possible, gives the same numbers, and is faster.

    A graph reads the memory that the eager products read: it is kept only as long as the plan says that this is the same
    (:meth:`Repeatable.reads`), and holds it. It is compared with eager products of two operands before it is used.

    Args:
        problem: says whether graphs are wanted; its budget counts them.
        plan: of the products.
    """

    def __init__(self, problem: Problem, plan: Repeatable) -> None:
        self.problem, self.plan = problem, plan
        self._unseen: tuple[Snapshot, Tensor] | None = None
        """The operand of the last product, where the plan has not seen it."""

    def dense(self, snapshot: Snapshot) -> Tensor | None:
        """The matrix, where the plan has a cheaper way than products; nothing is captured."""
        return self.plan.dense(snapshot)

    def apply(self, snapshot: Snapshot, x: Tensor) -> Tensor:
        """The product with x (n, K), shape (m, K)."""
        if capturing(x.device):
            return self.plan.apply(snapshot, x)
        with snapshot.lock:
            product = self._product(snapshot, x.shape[1])
            if product.graph is not None:
                if product.reads is not None and product.reads.same(self.plan.reads(snapshot, x.shape[1])):
                    self._touch(product)
                    self._unseen = snapshot, x
                    return product.graph(x)
                product.drop()
            self._unseen = None
            result = self.plan.apply(snapshot, x)
            if product.declined is None:
                self._consider(product, snapshot, x, result)
            return result

    def catch_up(self) -> None:
        """Take the last product by the plan, if it was replayed, so that the plan can report on it."""
        if self._unseen is not None:
            (snapshot, x), self._unseen = self._unseen, None
            with self.problem.differentiating():
                self.plan.apply(snapshot, x)

    def reads(self, snapshot: Snapshot, columns: int) -> Reads | str:
        """What products read, as those of the plan do."""
        return self.plan.reads(snapshot, columns)

    def lines(self, snapshot: Snapshot) -> list[str]:
        """The lines of the plan, and what became of products of each width."""
        known = sorted(self._products(snapshot).items())
        lines = [line for width, product in known if (line := product.line(width)) is not None]
        return [*self.plan.lines(snapshot), *indent(lines)]

    def _products(self, snapshot: Snapshot) -> dict[int, CapturedProduct]:
        every = self.problem.cached(snapshot).get(
            "graphs", None, WeakKeyDictionary[Replayed, dict[int, CapturedProduct]]
        )
        return every.setdefault(self, {})

    def _product(self, snapshot: Snapshot, width: int) -> CapturedProduct:
        products = self._products(snapshot)
        if width not in products:
            measured = self.problem.measured
            name = measured.name("graph", f"{self.plan.lines(snapshot)[0]}, {width} columns")
            products[width] = CapturedProduct(Race(measured, name))
        return products[width]

    def _touch(self, product: CapturedProduct) -> None:
        assert product.reads is not None
        for keeper in product.reads.keepers:
            self.problem.budget.touch(keeper)
        self.problem.budget.touch(product)

    def _consider(self, product: CapturedProduct, snapshot: Snapshot, x: Tensor, result: Tensor) -> None:
        reads = self.plan.reads(snapshot, x.shape[1])
        if isinstance(reads, str):
            product.count = 0
            return
        if product.seen(reads) and bool(torch.isfinite(result).all()):  # others could not be compared
            product.declined = self._capture(product, reads, snapshot, x, result)
            self._unseen = snapshot, x  # the plan has multiplied others meanwhile
            if product.declined is not None:
                product.drop()

    def _capture(
        self, product: CapturedProduct, reads: Reads, snapshot: Snapshot, x: Tensor, result: Tensor
    ) -> str | None:
        """Capture and compare; why the graph is not used, or None."""
        problem, race = self.problem, product.race
        if race.known is False and problem.graphs != True:  # noqa: E712  "auto" is true as well
            return "which was not faster before"
        pool = problem.cached(snapshot).get("graph pool", None, torch.cuda.graph_pool_handle)
        try:
            graph = CudaGraph(lambda v: self.plan.apply(snapshot, v), x, pool)
            other = x.flip(0)  # by which a product that does not read its operand is found out
            wrong = differs(graph(x), result) or differs(graph(other), self.plan.apply(snapshot, other))
        except CurvalgError:
            raise
        except RuntimeError as error:  # an operation that waits for the device, or that cannot be captured
            return f"{str(error).strip().splitlines()[0]}"
        if wrong:
            return "whose products differ from eager ones"
        if not problem.budget.reserve(product, graph.nbytes):
            needed, limit = graph.nbytes / 2**20, problem.budget.limit / 2**20
            return f"which needs {needed:.3g} MiB of a budget of {limit:.3g} MiB"
        if problem.graphs is True:
            race.decide(True)
        else:
            eager, replayed = (lambda: self.plan.apply(snapshot, x)), (lambda: graph(x))
            if not race.run(
                {False: Candidate(eager, warm=True), True: Candidate(replayed, handicap=FASTER, warm=True)},
                within=math.inf,  # the message has the clocks of both
            ):
                return (
                    f"which is not faster ({1e3 * race.seconds[True]:.2g} ms against {1e3 * race.seconds[False]:.2g})"
                )
        problem.budget.depends(product, reads.keepers)
        product.graph, product.reads = graph, reads
        return None


def replayed(problem: Problem, plan: Repeatable) -> Repeatable:
    """The products of a plan, replayed where the problem has graphs."""
    return Replayed(problem, plan) if problem.graphs else plan


def differs(got: Tensor, expected: Tensor) -> bool:
    """Whether two products differ by more than the order of their sums explains."""
    return not bool((got - expected).norm() <= torch.finfo(got.dtype).eps ** 0.75 * expected.norm())

"""The plan of a run: memory of a rank, traffic, work and time, by arithmetic alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

from curvalg.errors import OptionError
from curvalg.planning.amounts import parse_bytes, parse_count, parse_rate, shown_bytes, shown_flops, shown_seconds
from curvalg.planning.workload import Workload

Shard: TypeAlias = Literal["data", "parameters"]

FRAME = 256
"""Bytes of a frame, with which each exchange begins."""
RIDES = 27
"""Numbers that ride in a frame, so that no payload follows."""
MOST_WHOLE = 2
"""Units that are whole at a time."""
VECTORS = 5
"""Vectors of a product beside the basis: the operand, the gradient, a batch's product, the sum, and what is exchanged."""
SEARCHED = 24
"""Powers of two, up to which the smallest number of ranks that fits is looked for."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the rank with the most.

    Attributes:
        parameters: its part of the weights, and all buffers.
        snapshot: the copy of them that products are of.
        whole_units: weights that are whole at a time, at most.
        buffers: of the largest exchange.
        vectors: of a product.
        basis: of the Krylov vectors.
        recordings: graphs of one batch or, where they are kept, of all batches of a rank.
    """

    parameters: int
    snapshot: int
    whole_units: int
    buffers: int
    vectors: int
    basis: int
    recordings: int

    @property
    def total(self) -> int:
        """The sum of all of these."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class TrafficPlan:
    """Exchanges of one kind in a product, on one rank.

    Attributes:
        calls: how many there are.
        bytes: of all payloads, as ``problem.group`` counts them.
        moved: bytes through a link, by ring algorithms.
    """

    calls: int
    bytes: int
    moved: float


@dataclass(frozen=True)
class RunPlan:
    """What a product takes, and a Lanczos run, on each rank; ``str(plan)`` is a table.

    Attributes:
        expression: what is multiplied.
        ranks: processes.
        shard: what is dealt out over them besides the data: "data" (nothing) or "parameters".
        columns: of a product.
        steps: of the Lanczos run.
        memory: bytes on the rank with the most.
        traffic: exchanges of a product by kind: "all-reduce", or "gather" and "reduce-scatter", and "frame".
        flops: of a product, on the rank with the most data.
        orthogonalisation: FLOPs of all steps that keep the basis orthonormal, each Lanczos vector against all before it, twice.
        compute, exchange: seconds of a product; None where flops= or bandwidth= was not given. They do not overlap.
        device_memory: bytes that there are, or None.
        fits: whether the memory is enough; None where it is not known how much there is.
        cure: what helps where it does not.
        notes: what was assumed.
    """

    expression: str
    ranks: int
    shard: Shard
    columns: int
    steps: int
    memory: MemoryPlan
    traffic: dict[str, TrafficPlan]
    flops: float
    orthogonalisation: float
    compute: float | None
    exchange: float | None
    device_memory: float | None
    fits: bool | None
    cure: str | None
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float | None:
        """The seconds of a product: computing and exchanging, one after the other; None where a rate is not known."""
        return None if self.compute is None or self.exchange is None else self.compute + self.exchange

    @property
    def run_seconds(self) -> float | None:
        """The seconds of all steps, with what keeps the basis orthonormal at the same rate; None where one is not known."""
        if self.seconds is None or self.compute is None:
            return None
        share = self.orthogonalisation / self.flops if self.flops else 0.0
        return self.steps * self.seconds + share * self.compute

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """What there is to say: (topic, what, how much)."""
        labels = {
            "whole_units": "whole units, at most",
            "buffers": "exchange buffers",
            "basis": f"basis of {self.steps}",
        }
        labels |= {"vectors": "vectors of a product"}
        for name, nbytes in asdict(self.memory).items():
            yield "memory a rank", labels.get(name, name), shown_bytes(nbytes)
        total = shown_bytes(self.memory.total)
        if self.device_memory is not None:
            total += f" of {shown_bytes(self.device_memory)}: {'fits' if self.fits else 'does not fit'}"
        yield "memory a rank", "together", total
        for kind, traffic in self.traffic.items():
            yield "traffic a product", kind, f"{traffic.calls} calls, {shown_bytes(traffic.bytes)}"
        yield "a product", "work", shown_flops(self.flops)
        unknown = "unknown without flops=", "unknown without bandwidth="
        for what, seconds, missing in zip(
            ("computing", "exchanging"), (self.compute, self.exchange), unknown, strict=True
        ):
            yield "a product", what, missing if seconds is None else shown_seconds(seconds)
        yield f"{self.steps} Lanczos steps", "orthonormal basis", shown_flops(self.orthogonalisation)
        if self.run_seconds is not None:
            yield f"{self.steps} Lanczos steps", "time, nothing overlapping", shown_seconds(self.run_seconds)

    def __str__(self) -> str:
        how = "parameters in parts" if self.shard == "parameters" else "whole parameters on each"
        lines, topic = [f"{self.expression} on {self.ranks} ranks, {how}"], None
        for name, what, much in self.rows():
            if name != topic:
                lines, topic = [*lines, name], name
            lines.append(f"  {what:<26}{much}")
        lines += [f"cure: {self.cure}"] if self.cure else []
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def as_json(self) -> str:
        """The plan for programs: one JSON object."""
        record: dict[str, Any] = asdict(self)
        record["memory"]["total"] = self.memory.total
        return json.dumps(record | {"seconds": self.seconds, "run_seconds": self.run_seconds}, indent=2)


def plan_run(
    work: Workload,
    *,
    ranks: int = 1,
    device_memory: float | str | None = None,
    shard: Shard | None = None,
    steps: int = 100,
    columns: int = 1,
    flops: float | None = None,
    bandwidth: float | None = None,
    latency: float = 1e-5,
    expression: str = "a matrix",
) -> RunPlan:
    """The plan of a product and of a Lanczos run, of numbers alone.

    A rank computes its share of the batches and exchanges after it: seconds = FLOPs / rate + moved bytes / bandwidth +
    latency · calls. By ring algorithms an all-reduce of n bytes moves 2 n (R − 1)/R through each link, a gather to n bytes
    and a reduce-scatter of n bytes (R − 1)/R n.

    Args:
        work: what a product takes.
        ranks: R, the processes.
        device_memory: bytes a rank has, or text such as "80GB".
        shard: "data": every process has all parameters; "parameters": a part; None: the first, unless it does not fit.
        steps: of the Lanczos run, whose basis has as many vectors.
        columns: of a product.
        flops: floating-point operations a second that a rank sustains.
        bandwidth: bytes a second of a link.
        latency: seconds of an exchange of nothing.
        expression: for people.

    Raises:
        OptionError: a number that is out of its range.

    References: Rajbhandari et al., ZeRO, SC 2020, for what parts of parameters exchange; Patarasuk and Yuan, 2009, for rings.

    >>> from curvalg.planning import UnitSizes, Workload
    >>> layers = (UnitSizes(((10**9 // 50, 1),)),) * 50
    >>> work = Workload.of_dense(layers, rows=10**7, batch_rows=100)
    >>> plan = plan_run(work, ranks=1000, device_memory="80GB", shard="parameters")
    >>> plan.fits, plan.memory.basis, plan.traffic["gather"].calls
    (True, 400000000, 25000)
    """
    ranks, steps = parse_count(ranks, "ranks="), parse_count(steps, "steps=")
    columns = parse_count(columns, "columns=")
    have = None if device_memory is None else parse_bytes(device_memory, "device_memory=")
    rate, link = parse_rate(flops, "flops="), parse_rate(bandwidth, "bandwidth=")
    if latency != 0:
        parse_rate(latency, "latency=")
    if shard is not None and shard not in get_args(Shard):
        raise OptionError(f"shard= is 'data' or 'parameters', got {shard!r}")

    def memory(kind: Shard, count: int) -> MemoryPlan:
        return _memory(work, kind, count, steps, columns)

    if shard is None:
        shard = "data"
        if have is not None and ranks > 1 and work.divisible and memory("data", ranks).total > have:
            shard = "parameters"
    needed = memory(shard, ranks)
    fits = None if have is None else needed.total <= have
    cure = None if have is None or fits else _cure(memory, shard, work, ranks, have)
    batches = work.batches(ranks)
    kept = shard == "data" and work.keeps(ranks)
    done = work.product(columns, kept=kept)
    share = min(batches * work.batch_rows, work.rows) / work.batch_rows
    traffic = _traffic(work, shard, ranks, batches, columns)
    own = work.part(ranks if shard == "parameters" else 1)
    seconds = None if rate is None else share * done.flops / rate
    exchange = 0.0 if ranks == 1 else None
    if link is not None and ranks > 1:
        exchange = sum(t.moved / link + latency * t.calls for t in traffic.values())
    return RunPlan(
        expression,
        ranks,
        shard,
        columns,
        steps,
        needed,
        traffic,
        share * done.flops,
        # Σⱼ 2 · 4 j d for j up to the number of steps: two passes, each of inner products and of combinations.
        4.0 * steps * (steps + 1) * own,
        seconds,
        exchange,
        have,
        fits,
        cure,
        work.notes,
    )


def _memory(work: Workload, shard: Shard, ranks: int, steps: int, columns: int) -> MemoryPlan:
    parts = ranks if shard == "parameters" else 1
    weights = sum(unit.part(parts) * unit.itemsize for unit in work.units) + work.buffers
    vector = work.part(parts) * work.itemsize
    whole = sorted((unit.numbers * unit.itemsize for unit in work.units), reverse=True)[:MOST_WHOLE]
    sent = max(ranks * unit.part(ranks) * max(unit.itemsize, unit.summed) for unit in work.units)
    cut = shard == "parameters" and ranks > 1
    if shard == "data" and work.keeps(ranks):
        recordings = sum(p.nbytes for p in work.passes) * work.batches(ranks)
    else:
        recordings = max((p.nbytes if p.fresh is None or cut else p.fresh.nbytes for p in work.passes), default=0)
    return MemoryPlan(
        parameters=weights,
        snapshot=weights,
        whole_units=sum(whole) if cut else 0,
        buffers=sent if cut else 0,
        vectors=VECTORS * columns * vector,
        basis=steps * vector,
        recordings=recordings,
    )


def _traffic(work: Workload, shard: Shard, ranks: int, batches: int, columns: int) -> dict[str, TrafficPlan]:
    """Exchanges of a product by kind."""
    if ranks == 1:
        return {}
    ring = (ranks - 1) / ranks
    if shard == "data":
        numbers = columns * work.size
        calls = work.sums if numbers > RIDES else 0
        nbytes = calls * numbers * work.summed
        found = {"all-reduce": TrafficPlan(calls, nbytes, 2 * ring * nbytes)}
        frames = work.sums
    else:
        done = work.product(columns, kept=False)
        if work.passes and len(done.gathers) != len(work.units):
            raise OptionError(
                f"parts of parameters need counts of gathers of each unit, of {len(work.units)} there are {len(done.gathers)}; "
                "give StageWork(flops, gathers, scatters), or shard='data'"
            )
        units = [(unit, ranks * unit.part(ranks)) for unit in work.units]
        found = {}
        for kind, counts in (("gather", done.gathers), ("reduce-scatter", done.scatters)):
            sizes = [n * (unit.itemsize if kind == "gather" else unit.summed) for unit, n in units]
            counts = counts or (0,) * len(sizes)  # of no pass over the data
            nbytes = batches * sum(count * size for count, size in zip(counts, sizes, strict=True))
            found[kind] = TrafficPlan(batches * sum(counts), nbytes, ring * nbytes)
        frames = sum(t.calls for t in found.values())
    frames += work.totals
    found["frame"] = TrafficPlan(frames, frames * ranks * FRAME, ring * frames * ranks * FRAME)
    return found


def _cure(memory: Callable[[Shard, int], MemoryPlan], shard: Shard, work: Workload, ranks: int, have: float) -> str:
    """The smallest number of ranks that fits, or what else would have to be smaller."""
    least = memory(shard, ranks)
    if work.divisible:
        for power in range(1, SEARCHED):
            found = memory("parameters", 2**power)
            if found.total <= have:
                low, high = 2 ** (power - 1), 2**power
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (low, middle) if memory("parameters", middle).total <= have else (middle, high)
                return f"{high} ranks with parts of the parameters (fully_shard, or shard='parameters') fit"
            least = min(least, found, key=lambda m: m.total)
    largest = max(asdict(least).items(), key=lambda item: item[1])[0]
    what = "no number of ranks fits" if work.divisible else "more ranks do not help"
    return f"{what}: try {_ADVICE.get(largest, 'a device with more memory')}"


_ADVICE = {
    "recordings": "smaller batches, or cache=0",
    "basis": "fewer steps",
    "vectors": "fewer columns at a time, or products over some of the parameters (restrict)",
    "whole_units": "fully_shard on smaller modules",
    "buffers": "fully_shard on smaller modules",
}

"""Plans of operators: the numbers of a model, its data and a product, from which a run is planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from curvalg.errors import OptionError
from curvalg.lowering.operators.structured_operator import StructuredOperator
from curvalg.lowering.plans.algebra_plan import BlocksPlan, SharedPlan, SumPlan, UnboundPlan
from curvalg.lowering.plans.inverse_plan import InversePlan
from curvalg.lowering.plans.low_rank_plan import LowRankPlan
from curvalg.lowering.plans.of_data.gradient_plan import GradientPlan
from curvalg.lowering.plans.of_data.output_plan import OutputPlan
from curvalg.lowering.plans.of_data.sweep_plan import SweepPlan
from curvalg.lowering.plans.owned_plan import OwnedPlan
from curvalg.lowering.plans.plan import Plan
from curvalg.planning.amounts import parse_count
from curvalg.planning.rehearsal import Rehearsal, Stages, rehearse
from curvalg.planning.run_plan import RunPlan, Shard, plan_run
from curvalg.planning.workload import PassWork, StageWork, UnitSizes, Workload
from curvalg.problem import Problem
from curvalg.problem.data.batches import ReadBatch
from curvalg.problem.model.model import Model, ModuleModel
from curvalg.problem.model.sharded.parameter_part import ParameterPart
from curvalg.problem.model.sharded.planned_model import PlannedModel
from curvalg.problem.model.sharded.set_aside import fully_sharded
from curvalg.problem.model.sharded.sharded_model import ShardedModel
from curvalg.tensors import trees

UNCUT = "parameters in parts are those of fully_shard; shard='parameters' holds all of them on each rank, too"


class PlannedOperator(StructuredOperator):
    """An operator that says what products take before there is one."""

    def plan(
        self,
        ranks: int = 1,
        device_memory: float | str | None = None,
        *,
        shard: Shard | None = None,
        steps: int = 100,
        columns: int = 1,
        flops: float | None = None,
        bandwidth: float | None = None,
        latency: float = 1e-5,
    ) -> RunPlan:
        """Memory a rank, traffic, work and time of a product and of a Lanczos run, without running it.

        The first batch goes through the model on tensors without numbers: FLOPs, the memory of graphs, and which weights are
        gathered when, are those of the operations that a product would take. Nothing is computed. Where that is impossible (a
        model that branches on numbers), FLOPs are 2 W a position, of W weights, and ``notes`` says so. Batches count as
        equally large. Memory leaves out what a single operation needs for itself, and torch's own.

        Args:
            ranks: processes.
            device_memory: bytes a rank has, or text such as "80GB"; with it, ``fits`` and ``cure`` are known.
            shard: "data": every rank has all parameters and a part of the batches; "parameters": of the parameters, too;
                None: as the problem is, or "parameters" where all of them do not fit on several ranks.
            steps: of the Lanczos run.
            columns: K of a product with (D, K).
            flops: floating-point operations a second that a rank sustains.
            bandwidth: bytes a second of a link.
            latency: seconds of an exchange of nothing.

        Returns:
            A :class:`~curvalg.planning.RunPlan`; printed, a table.

        Raises:
            OptionError: a number that is out of its range, or parts of parameters of a model that has no modules.
            ProblemError: a model of ``parallelize_module``.

        References: see :func:`curvalg.planning.plan_run`.

        >>> import torch
        >>> from curvalg import Problem, registry
        >>> model = torch.nn.Sequential(torch.nn.Linear(100, 50), torch.nn.Tanh(), torch.nn.Linear(50, 10))
        >>> data = [(torch.randn(32, 100), torch.randint(0, 10, (32,)))] * 8
        >>> op = registry.build("hessian").lower(Problem(model, torch.nn.CrossEntropyLoss(), data))
        >>> plan = op.plan(ranks=4, device_memory="8GB", flops=1e12, bandwidth=1e10, steps=20)
        >>> plan.fits, plan.traffic["all-reduce"].bytes == 4 * 5560, plan.memory.basis == 20 * 4 * 5560
        (True, True, True)
        """
        ranks = parse_count(ranks, "ranks=")
        options: dict[str, Any] = {
            "ranks": ranks,
            "device_memory": device_memory,
            "steps": steps,
            "columns": parse_count(columns, "columns="),
            "flops": flops,
            "bandwidth": bandwidth,
            "latency": latency,
            "expression": str(self.expr),
        }
        with self._together(), self.problem.lock:
            self._current()
            if shard is not None or self.problem.group.sharded:
                kind = shard or "parameters"
                return plan_run(self._workload(kind, columns), shard=kind, **options)
            found = plan_run(self._workload("data", columns), shard="data", **options)
            if found.fits is False and ranks > 1 and isinstance(self.problem.model, ModuleModel):
                return plan_run(self._workload("parameters", columns), shard="parameters", **options)
            return found

    def _workload(self, kind: Shard, columns: int) -> Workload:
        """The numbers of a product; the same on all processes."""
        sample = next(iter(self.problem.read()), None) if self.problem.totals.rows_here else None
        own = None if sample is None else _workload(self.problem, self._plan, sample, kind, columns)
        if self.problem.group.alone:
            assert own is not None  # one process has all data
            return own
        return next(found for found in self.problem.group.objects(own) if found is not None)


@dataclass
class Counted:
    """What is in a plan.

    Attributes:
        sweeps: passes over the data.
        sums: exchanges of vectors in a product, where processes have whole ones.
        notes: what is not counted, and what is counted otherwise than it may come.
    """

    sweeps: list[SweepPlan] = field(default_factory=list)
    sums: int = 0
    notes: dict[str, None] = field(default_factory=dict)

    def add(self, plan: Plan) -> None:
        """Count a plan and all inside of it."""
        if isinstance(plan, (SumPlan, BlocksPlan)):
            kinds = (SweepPlan, LowRankPlan, SharedPlan)
            of_data = [part for part in plan.inner if isinstance(part, kinds)]
            before = self.sums
            for summand in of_data:
                self.add(summand)
            self.sums = before + bool(of_data)
            others = [part for part in plan.inner if not isinstance(part, kinds)]
        else:
            others = [*plan.inner]
        if isinstance(plan, SweepPlan):
            self.sweeps.append(plan)
            self.sums += 1
        elif isinstance(plan, SharedPlan):
            before = self.sums
            self.add(plan.own)
            self.sums = before + 1
        elif isinstance(plan, LowRankPlan):
            self.notes["a product from kept layer inputs and output deltas takes less, where that is chosen later"] = (
                None
            )
            self.add(plan.otherwise)
        elif isinstance(plan, InversePlan) and not plan.solver.iterative:
            self.notes[f"{plan.expr} by {plan.solver.name}: its structure is made once, which is not counted"] = None
        elif isinstance(plan, UnboundPlan):
            self.notes[
                f"{plan.expr} is made by one pass over the data, which is not counted; products exchange nothing, or, where "
                "parameters lie in parts, a vector that goes to the owners of layers and back"
            ] = None
        elif isinstance(plan, OwnedPlan):
            self.notes[
                "vectors that go to the owners of layers and back are not counted, nor are the layers' factors"
            ] = None
        elif isinstance(plan, (OutputPlan, GradientPlan)):
            what = plan.kind if isinstance(plan, OutputPlan) else plan.term
            self.notes[f"{what} goes over the data in each product, which is not counted"] = None
        else:
            if isinstance(plan, InversePlan):
                self.notes[f"{plan.expr}: what is counted is one iteration of {plan.solver.name}"] = None
            for part in others:
                self.add(part)


def _workload(problem: Problem, plan: Plan, sample: ReadBatch, kind: Shard, columns: int) -> Workload:
    if kind == "parameters" and not isinstance(problem.model, ModuleModel):
        raise OptionError(
            "the model is a function of its parameters, which has no modules whose weights could come together one after the "
            "other; pass shard='data', or make the Problem of an nn.Module"
        )
    counted = Counted()
    counted.add(plan)
    totals = problem.totals
    units, buffers = _sizes(problem)
    passes = tuple(_pass(sweep, sample, kind, columns, counted.notes) for sweep in counted.sweeps)
    if kind == "parameters" and not (isinstance(problem.model, ShardedModel) and fully_sharded(problem.model.module)):
        counted.notes[
            "parameters in parts are those of fully_shard; shard='parameters' holds all of them on each rank, too"
        ] = None
    return Workload(
        units,
        totals.rows,
        sample.rows,
        passes,
        size=problem.layout.whole.size,
        buffers=buffers,
        itemsize=problem.dtype.itemsize,
        summed=(problem.accumulate or problem.dtype).itemsize,
        sums=counted.sums,
        totals=sum(bool(sweep.sweep.reduces) for sweep in counted.sweeps),
        budget=0 if problem.group.sharded else problem.budget.limit,
        divisible=isinstance(problem.model, ModuleModel),
        dealt=None if problem.group.alone else (problem.group.size, totals.most_batches),
        notes=tuple(counted.notes),
    )


def _sizes(problem: Problem) -> tuple[tuple[UnitSizes, ...], int]:
    """All parameters of the model by what is whole together, and the bytes of its buffers."""
    model = problem.model
    if not isinstance(model, ModuleModel):
        tensors = [t for t in model.own.values() if isinstance(t, Tensor)]
        itemsize = max(t.itemsize for t in tensors)
        return (UnitSizes(tuple((t.numel(), 1) for t in tensors), itemsize, max(itemsize, 4)),), 0
    pieces = [unit.pieces for unit in _planned(problem).units]
    parameters = {id(p) for p in model.module.parameters()}
    buffers = {id(b): b.nbytes for b in model.module.buffers() if id(b) not in parameters}
    return tuple(_unit(some) for some in pieces), sum(buffers.values())


def _unit(pieces: Sequence[ParameterPart]) -> UnitSizes:
    tensors = tuple((piece.slices, piece.each) for piece in pieces)
    return UnitSizes(
        tensors, max(piece.dtype.itemsize for piece in pieces), max(piece.summed.itemsize for piece in pieces)
    )


def _planned(problem: Problem) -> PlannedModel:
    """The model cut over processes that are not there."""
    model = problem.model
    assert isinstance(model, ModuleModel)
    return PlannedModel(model.module, list(model.chosen), model.rule)


def _model(problem: Problem, kind: Shard) -> Model | PlannedModel:
    """The model as it lies on the ranks of a plan.

    Raises:
        OptionError: it is cut already.
    """
    model = problem.model
    if kind == "parameters":
        return _planned(problem)
    if not isinstance(model, ShardedModel):
        return model
    if fully_sharded(model.module):
        raise OptionError(
            "the model is sharded by fully_shard, so that its plan is with parts of the parameters; pass shard='parameters', "
            "or plan a model before it is sharded"
        )
    return ModuleModel(model.module, list(model.chosen), model.rule)


def _pass(plan: SweepPlan, sample: ReadBatch, kind: Shard, columns: int, notes: dict[str, None]) -> PassWork:
    """What a sweep takes with one batch."""
    problem, sweep = plan.problem, plan.sweep
    stages: Stages = "hessian" if sweep.curved and not sweep.dataset_terms else "both" if sweep.curved else "ggn"
    model = _model(problem, kind)
    options: dict[str, Any] = {
        "device": problem.device,
        "columns": columns,
        "apart": bool(sweep.reduces),
        "casting": problem.casting,
    }
    try:
        found = rehearse(model, sample.batch, stages, **options)
        fresh = None
        if kind == "data" and stages == "ggn" and columns == 1:  # by forward AD, where nothing is kept
            fresh = _work(rehearse(model, sample.batch, stages, transient=True, **options))
    except Exception as error:  # whatever a model does that needs numbers
        return _by_formula(problem, model, sample, stages, error, notes)
    if kind == "data" and found.output_bytes > problem.output_memory:
        notes["outputs may be made in chunks, which takes less memory than is said here"] = None
    return replace(_work(found), fresh=fresh)


def _work(found: Rehearsal) -> PassWork:
    return PassWork(found.record, found.first, found.further, found.nbytes, found.reserved)


def _by_formula(
    problem: Problem,
    model: Model | PlannedModel,
    sample: ReadBatch,
    stages: Stages,
    error: Exception,
    notes: dict[str, None],
) -> PassWork:
    """The work by counting weights: a forward takes F = 2 W FLOPs a position, a record 3 F, a column 6 F."""
    targets = [t for t in trees.tensors(sample.target) if not t.is_floating_point()]
    positions = max([sample.rows, *(t.numel() for t in targets)])
    weights = sum(unit.numbers for unit in _sizes(problem)[0])
    flops = 2.0 * weights * positions
    reason = str(error).strip().splitlines()[0][:120] if str(error) else type(error).__name__
    notes[f"FLOPs by the formula 2 W · positions, recordings unknown: the model cannot be rehearsed ({reason})"] = None
    units = len(model.units) if isinstance(model, PlannedModel) else 0
    record = StageWork(3 * flops, (2,) * units, (1,) * units)
    column = StageWork(6 * flops if stages != "ggn" else 4 * flops, (3,) * units, (1,) * units)
    return PassWork(record, column, column)

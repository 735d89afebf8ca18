"""Variances and covariances of the outputs of single rows, given a covariance of the parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from curvalg.distributed.group import in_turns, shared_call
from curvalg.errors import ExpressionError, ProblemError
from curvalg.estimate.attribution.sample_gradients import shared_records
from curvalg.estimate.attribution.units.checked_units import checked_units
from curvalg.estimate.attribution.units.eigen_unit import LayerSizes
from curvalg.estimate.attribution.units.units import Units, WholeUnit, is_whole
from curvalg.estimate.gradients.gram_variance import GramVariance
from curvalg.estimate.target import require_operator, require_problem
from curvalg.lowering import CurvatureOperator
from curvalg.problem import Evaluation, Problem, Snapshot
from curvalg.problem.layers.recorded import RecordedLayers, record_layers
from curvalg.problem.model.layer_record import LayerRecord
from curvalg.problem.model.sharded import require_whole_vectors
from curvalg.problem.verification.row_checks import warn_of_mixed_rows

WIDTH = 32
"""Outputs of a row that are taken through the network at a time, where only variances are asked for."""


@shared_call
def functional_variance(op: CurvatureOperator, problem: Problem, *, diagonal: bool = False) -> Tensor:
    """The covariances Jₙ A Jₙᵀ of the outputs of each row n of a problem, for a covariance A of the parameters.

    With A = (H + δ I)⁻¹ of a Laplace approximation these are the variances of the linearised network's outputs; MacKay, Neural
    Computation 4, 1992; Immer et al., arXiv 2008.08400. Where A is block-diagonal in Kronecker eigenbases (KFAC, EKFAC) inputs
    and output deltas of the layers are changed into these: no row of a Jacobian is multiplied out, of layers without shared
    positions. Other blocks of arrays multiply the rows block by block; (V Vᵀ + δ I)⁻¹ of few columns needs their inner products
    with the columns alone (the kernel of the training data); any other operator is applied to the rows.

    Args:
        op: A (D × D), an operator on parameters such as ``inverse(registry.build("kfac") + 1e-2 * Identity).lower(training)``.
        problem: the rows that are asked for, with the same model, as in ``Problem(model, None, X)``.
        diagonal: the variances alone.

    Returns:
        (N, C, C) for N rows of C outputs each (flattened), or (N, C); in the precision of the problem.

    Raises:
        ExpressionError: the operator is not one on parameters; a problem of other parameters, or at other values of them.
        ConvergenceError: a solve did not reach its tolerance.
        ProblemError: rows influence each other (batch-norm in training mode); a model that computes another function.

    >>> import torch
    >>> from curvalg import Identity, Problem, inverse, registry
    >>> net = torch.nn.Linear(3, 2)
    >>> training = Problem(net, torch.nn.MSELoss(), (torch.randn(6, 3), torch.randn(6, 2)))
    >>> op = inverse(registry.build("kfac") + 0.1 * Identity).lower(training)
    >>> functional_variance(op, Problem(net, None, torch.randn(4, 3))).shape
    torch.Size([4, 2, 2])
    """
    require_operator(op, "functional_variance")
    require_problem(problem, "functional_variance")
    for shared in (op.problem, problem):
        require_whole_vectors(shared, "functional_variance")
    _require_parameters(op, problem)
    snapshot = op.snapshot if problem is op.problem else problem.snapshot()
    made, group = _Variance(op), op.problem.group

    def parts(made: _Variance = made) -> list[Tensor]:
        evaluations = problem.evaluations(snapshot, order_matters=True)
        return [made.of_batch(recorded, diagonal) for recorded in _compared(made, problem, map(_rows_of, evaluations))]

    with op.problem.differentiating(), problem.differentiating():
        if problem.group.alone:
            return torch.cat(parts())
        _ = op.problem.totals, problem.totals  # known to all before one of them reads a batch
        if not group.alone:
            made.settle(shared_records(group, _first(problem, snapshot)))
        if made.multiplies:
            found = in_turns(group, op._apply, lambda apply: parts(made.by(apply)))
        else:
            found = parts()
        return problem.group.rows(torch.cat(found) if found else None)


def _compared(made: _Variance, problem: Problem, batches: Iterator[RecordedLayers]) -> Iterator[RecordedLayers]:
    """Batches of rows, compared among processes where all of them have these rows whole."""
    if not problem.group.alone:
        yield from batches
        return
    for recorded in batches:
        made.group.alike("rows", recorded.z)
        yield recorded
    made.group.alike("rows", None)


def _first(problem: Problem, snapshot: Snapshot) -> list[LayerRecord] | None:
    """Records of some outputs of the first batch; None where this process has no data."""
    for evaluation in problem.evaluations(snapshot, order_matters=True):
        return next(unit_records(_rows_of(evaluation), WIDTH))
    return None


def _rows_of(evaluation: Evaluation) -> RecordedLayers:
    """The recording of a batch whose outputs have its rows."""
    recorded = record_layers(evaluation)
    warn_of_mixed_rows(evaluation, recorded.z)
    if len(recorded.batch.output) != evaluation.sample.rows:
        raise ProblemError(
            f"functional_variance: expected an output for each of the {evaluation.sample.rows} rows of a batch, got the shape "
            f"{tuple(recorded.batch.output.shape)}; a single row needs an axis for rows as well, X[None]"
        )
    return recorded


def _require_parameters(op: CurvatureOperator, problem: Problem) -> None:
    """Raise unless an operator is a square one on parameters that a problem has, at the same values."""
    if "outputs" in (op.expr.domain, op.expr.codomain) or op.expr.domain_params != op.expr.codomain_params:
        raise ExpressionError(
            f"functional_variance: expected a square operator on parameters, but {op.expr} is {op.shape[0]} x {op.shape[1]}"
        )
    op._current()
    mine, others = op._domain.layout, problem.layout
    assert mine is not None
    if problem is op.problem:
        return
    if any(others.shapes.get(name) != shape for name, shape in mine.shapes.items()):
        raise ExpressionError(
            f"functional_variance: expected a problem that has the {len(mine.names)} parameters of the operator, got one of "
            f"{len(others.names)}: {', '.join(list(others.names)[:4])}..."
        )
    if problem.dtype != op.problem.dtype or problem.device != op.problem.device:
        raise ExpressionError(
            f"functional_variance: expected a problem in the precision and on the device of the operator, {op.problem.dtype} "
            f"on {op.problem.device}, got {problem.dtype} on {problem.device}; convert the model and the data of one of them"
        )
    state = problem.snapshot().state
    if any(not torch.equal(op.snapshot.state[name], state[name]) for name in mine.names):
        raise ExpressionError(
            "functional_variance: expected a problem at the parameters of the operator, but their values differ; call "
            "refresh() on the operator"
        )
    op.problem.require_same_function(problem, "functional_variance: outputs")


class _Variance:
    """The forms gᵀ A g' of gradients of the outputs of a row, by what is known of A.

    Args:
        op: A.
    """

    def __init__(self, op: CurvatureOperator) -> None:
        self._op, self.group = op, op.problem.group
        self._units: Units | None = None
        self._gram = GramVariance.of(op)
        # Where other processes take part in its products, all have to multiply the same, and here all have the same rows.
        self._apply: Callable[[Tensor], Tensor] = lambda x: op._apply(self.group.first(x))

    def by(self, apply: Callable[[Tensor], Tensor]) -> _Variance:
        """The same with products that are taken in another way."""
        made = copy.copy(self)
        made._apply, made._units = apply, None
        made._units = made._as_whole()
        return made

    @property
    def multiplies(self) -> bool:
        """Whether products are those of the operator as a whole, in which several processes take part."""
        return not self.group.alone and self._units is not None and is_whole(self._units)

    def settle(self, records: Sequence[LayerRecord]) -> None:
        """Find the way by some records, the same on all processes."""
        self._units = self._make_units(records)

    def of_batch(self, recorded: RecordedLayers, diagonal: bool) -> Tensor:
        """The forms of all rows of a batch: (n, C, C), or (n, C)."""
        width = WIDTH if diagonal else None
        parts = [self._of(records, diagonal) for records in unit_records(recorded, width)]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _of(self, records: Sequence[LayerRecord], diagonal: bool) -> Tensor:
        if self._gram is not None and (found := self._gram.covariance(records)) is not None:
            return found.diagonal(dim1=1, dim2=2) if diagonal else found
        if self._units is None:
            self._units = self._make_units(records)
        rows, columns = records[0].rows, records[0].columns
        views = [(unit, unit.view(records)) for unit in self._units]
        if diagonal:
            return torch.stack([unit.quadratic(view, rows, columns) for unit, view in views]).sum(0).T
        return torch.stack([unit.covariance(view, rows, columns) for unit, view in views]).sum(0)

    def _make_units(self, records: Sequence[LayerRecord]) -> Units:
        op = self._op
        if op.shape[0] == op.problem.size and records_all(records, op):
            units = checked_units(op, shared_records(self.group, records), _rotates)
            return self._as_whole() if is_whole(units) else units
        return self._as_whole()

    def _as_whole(self) -> Units:
        assert self._op._domain.layout is not None
        return [WholeUnit(self._op._domain.layout.shapes, self._apply)]


def records_all(records: Sequence[LayerRecord], op: CurvatureOperator) -> bool:
    """Whether records are of the parameters of an operator's problem and no others."""
    return {name for record in records for name in record.params} == set(op.problem.layout.names)


def unit_records(recorded: RecordedLayers, width: int | None) -> Iterator[list[LayerRecord]]:
    """Records of the gradients of some outputs of every row at a time; None: of all."""
    z = recorded.batch.output
    numbers = math.prod(z.shape[1:])
    units = torch.eye(numbers, dtype=z.dtype, device=z.device).reshape(numbers, 1, *z.shape[1:])
    step = max(1, numbers if width is None else width)
    for at in range(0, numbers, step):
        some = units[at : at + step]
        yield recorded.records(some.expand(len(some), *z.shape))


def _rotates(sizes: LayerSizes) -> bool:
    return sizes.positions == 1 or sizes.of_inputs_and_deltas < sizes.of_gradients

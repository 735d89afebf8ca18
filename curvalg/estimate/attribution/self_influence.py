"""The influence of every training sample on itself."""

from __future__ import annotations

import torch
from torch import Tensor

from curvalg.distributed.group import in_turns, shared_call
from curvalg.estimate.attribution.influence import require_all_parameters
from curvalg.estimate.attribution.sample_gradients import (
    first_records,
    in_order,
    sample_gradients,
    shared_records,
)
from curvalg.estimate.attribution.units.checked_units import checked_units
from curvalg.estimate.attribution.units.eigen_unit import LayerSizes
from curvalg.estimate.attribution.units.units import Units, is_whole, whole
from curvalg.lowering import CurvatureOperator


@shared_call
def self_influence(op: CurvatureOperator) -> Tensor:
    """The forms s ∇cₙᵀ A ∇cₙ of every training sample n, (N,): the diagonal of ``influence(op).scores``.

    With A = (H + λ I)⁻¹ it predicts by how much a sample's own loss rises when it is left out: large for samples that were
    learnt by heart, as wrong labels are (Koh and Liang, arXiv 1703.04730, section 5.4). In a Kronecker eigenbasis (EKFAC,
    KFAC), and without shared positions, it comes from squares of inputs and deltas alone; else from the gradients of some
    samples at a time.

    Args:
        op: A, as of :func:`~curvalg.estimate.influence`.

    Returns:
        In the order of the data; with ``samples="position"`` the positions of a row follow each other in row-major order.

    Raises:
        ExpressionError: the operator is not one on all parameters of its problem.
        ConvergenceError: a solve did not reach its tolerance.
        ProblemError: samples influence each other (batch-norm in training mode).

    >>> import torch
    >>> from curvalg import Identity, Problem, inverse, registry
    >>> problem = Problem(torch.nn.Linear(3, 1), torch.nn.MSELoss(), (torch.randn(6, 3), torch.randn(6, 1)))
    >>> op = inverse(registry.build("ekfac") + 0.1 * Identity).lower(problem)
    >>> self_influence(op).shape
    torch.Size([6])
    """
    require_all_parameters(op, "self_influence")
    problem = op.problem
    problem.check(op.snapshot)
    problem.need_loss()
    scale = problem.totals.scale  # known to all before one of them reads a batch
    group = problem.group
    with problem.differentiating():
        if group.alone:
            return scale * _forms(op, None)
        units = checked_units(op, shared_records(group, first_records(problem, op.snapshot)), _rotates)
        if is_whole(units):
            own = in_turns(group, op._apply, lambda apply: _forms(op, whole(op, apply)))
        else:
            own = _forms(op, units)
        return scale * group.rows(own)


def _forms(op: CurvatureOperator, units: Units | None) -> Tensor:
    """The forms ∇cₙᵀ A ∇cₙ of the samples of this process; units are found by the first records where they are not given."""
    parts = [torch.zeros(0, dtype=op.problem.dtype, device=op.problem.device)]
    for samples in sample_gradients(op.problem, op.snapshot):
        found = []
        for _, records in samples.parts():
            units = units or checked_units(op, records, _rotates)
            views = [(unit, unit.view(records)) for unit in units]
            columns = records[0].columns
            each = [unit.quadratic(view, samples.rows, columns) for unit, view in views]
            found.append(torch.stack(each).sum(0)[None])
        parts.append(in_order(found)[0])
    return torch.cat(parts)


def _rotates(sizes: LayerSizes) -> bool:
    return sizes.positions == 1 or sizes.of_inputs_and_deltas < sizes.of_gradients

"""The check that derivatives of curvature are those of its values, by a central difference in float64."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from curvalg.errors import ProblemError
from curvalg.lowering.operators.live_form import DifferentiableSum, Ends, LiveForm, lacking
from curvalg.problem.passes.live_batch import LiveEvaluation
from curvalg.problem.verification.curvature_checks import ALLOWED, Constants
from curvalg.problem.verification.tangent_checks import random_directions, size_of
from curvalg.problem.verification.verdicts import FAILURES, few_rows
from curvalg.tensors.memory import widest

KINK = 10.0
"""How much larger the difference by the smallest step is than that by the largest where the state itself lies on a kink: there
the curvature jumps by as much however small the step is."""
ASIDE = 1e-2
"""How far from such a state, in units of the parameters' own size, derivatives are compared instead."""
STEPS = (1e-5, 1e-6, 1e-7)
"""Steps of the difference in units of the parameters' own size; a smaller one crosses fewer kinks, and rounds more."""


def swear_third_order(matrix: DifferentiableSum, evaluation: LiveEvaluation) -> None:
    """Check once a state that the derivative of lᵀA r is right, for random l and r along random directions.

    Args:
        matrix: A.
        evaluation: of a batch, of which a few rows are taken.

    Raises:
        ProblemError: it is not, or the model lacks one.
    """
    problem, structure = evaluation.problem, evaluation.snapshot.structure
    terms = sorted(repr(term) for _, term in matrix.entries)
    oath = f"third derivatives of {', '.join(terms)}{' and of the mean gradient' * bool(matrix.mean)}"
    if not problem.verify or oath in structure.found.sworn:
        return
    if widest(problem.device) != torch.float64:
        structure.found.notes["third derivatives"] = "no central difference: the device has no float64"
        return
    few, error, sizes = few_rows(evaluation), math.inf, dict[float, float]()
    for seed, step in enumerate(STEPS):
        # What is detached is a constant, unlike what a Function computes: where both move, both are tried.
        for hold in (False, True):
            try:
                found = _difference(matrix, few, seed, step, hold=hold)
                error, sizes[step] = min(error, found.error), min(sizes.get(step, math.inf), found.size)
            except FAILURES as failure:
                if set(problem.layout.dtypes.values()) == {torch.float64}:
                    raise lacking(failure) from failure
                structure.found.notes["third derivatives"] = "no central difference: the model does not run in float64"
                return
        if error <= ALLOWED:
            structure.found.sworn.add(oath)
            return
    if sizes[STEPS[-1]] > KINK * sizes[STEPS[0]]:
        beside = (_difference(matrix, few, seed, STEPS[-1], hold=False, aside=ASIDE) for seed in range(len(STEPS)))
        if any(found.error <= ALLOWED for found in beside):
            raise ProblemError(
                "the curvature has no derivative at this state, which lies on a kink: inputs of a piecewise operation lie "
                "where its pieces meet, such as activations that are exactly zero before a ReLU (zero rows and zero biases, "
                "channels that are silent). Beside it the derivatives are right. Move the parameters, leave such rows out, or "
                "take a smooth activation (GELU, softplus); Problem(verify=False) takes the side that torch chooses"
            )
    raise ProblemError(
        "the third derivatives of the model are wrong: the gradient of the curvature differs from a central difference by "
        f"{error:.1e}. Torch's formula for an operation is wrong, or a hook or a custom autograd Function gives a gradient "
        "that is not a derivative: write it in elementary operations. Or the state lies next to many kinks of a piecewise "
        "operation (ReLU), which every step crosses: take a smooth one. Problem(verify=False) leaves this check out"
    )


@dataclass(frozen=True)
class FormDifference:
    """A central difference of lᵀA r against its derivative.

    Args:
        error: relative.
        size: of the difference.
    """

    error: float
    size: float


def _difference(
    matrix: DifferentiableSum,
    evaluation: LiveEvaluation,
    seed: int,
    step: float,
    *,
    hold: bool,
    aside: float = 0.0,
) -> FormDifference:
    """The difference along one direction.

    Args:
        matrix, evaluation: A, and the batch.
        seed: of the direction.
        step: in units of the parameters' own size.
        hold: whether what is detached stays as it is.
        aside: how far from the state, along another direction.
    """
    values = [value.double() for value in evaluation.values()]
    sizes = [size_of([value]) or 1.0 for value in values]
    if aside:
        others = random_directions(evaluation, 10 * seed + 3, torch.float64)
        values = [value + aside * size * v for value, size, v in zip(values, sizes, others, strict=True)]
    drawn = [random_directions(evaluation, 10 * seed + number, torch.float64) for number in range(3)]
    left, right, move = ([v * size for v, size in zip(vs, sizes, strict=True)] for vs in drawn)
    form = evaluation.connected([value.requires_grad_() for value in evaluation.values()], {})[1]
    make = partial(evaluation.live_batch, form=form, share=1 / evaluation.problem.totals.denominator)
    cut = Constants()

    def at(distance: float) -> tuple[list[Tensor], float, Ends]:
        leaves = [(value + distance * m).requires_grad_() for value, m in zip(values, move, strict=True)]
        with (cut.given() if distance else cut.taken()) if hold else nullcontext():
            z = evaluation.connected_in_double(leaves)
        one, two = ([v[None] for v in vectors] for vectors in (left, right))
        return leaves, *LiveForm(matrix.entries, leaves, z, make)(one, two, one if matrix.mean else None)

    leaves, value, ends = at(0.0)
    parts = [float((g * m).sum()) for g, m in zip(ends.gradients(leaves), move, strict=True)]
    above, below = at(step)[1], at(-step)[1]
    difference = (above - below) / (2 * step)
    noise = 1e3 * torch.finfo(torch.float64).eps / step * max(map(abs, (value, above, below))) / ALLOWED
    scale = sum(map(abs, parts)) + abs(difference) + noise
    return FormDifference(abs(difference - sum(parts)) / scale if scale else 0.0, abs(difference))

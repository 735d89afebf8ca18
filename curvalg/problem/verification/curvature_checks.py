"""The check that second derivatives are those of the gradient: by a central difference, and by symmetry."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode

from curvalg.errors import ProblemError
from curvalg.problem.model_call import ModelCall
from curvalg.problem.verification.tangent_checks import (
    FLOOR,
    dot_of,
    norm_of,
    random_cotangent,
    random_directions,
    size_of,
)
from curvalg.problem.verification.verdicts import FAILURES, few_rows
from curvalg.tensors.backward import backward
from curvalg.tensors.graph import coarsest_dtype, operations
from curvalg.tensors.memory import widest

STEPS = (1e-6, 1e-8, 1e-10)
"""Steps of the central difference, in units of the parameters' own size, each along a direction of its own.

A difference across a kink is wrong by itself, however small the step: of a million activations by ReLU one changes its side
in nearly every step of 1e-6, and in hardly any of 1e-10. Rounding grows meanwhile, but stays far below errors of formulas.
"""
KINK = 100.0
"""How much larger the difference by the smallest step is than that by the largest where the state itself lies on a kink: a
gradient that jumps is divided by ever smaller steps. No difference says anything there."""
ASIDE = 1e-2
"""How far from such a state, in units of the parameters' own size, derivatives are compared instead."""
ALLOWED = 1e-4
"""Relative error of a difference in float64."""


def swear_curvature(evaluation: ModelCall, *, beforehand: bool = False) -> None:
    """Check once a structure that second derivatives are those of the gradient, by a central difference in float64.

    Once more on a batch whose graph has operations that no verified one had, and on all rows where the few lack some.

    Compared are (∂_w J)ᵀu by double backward and (J(θ + hw)ᵀu − J(θ)ᵀu)/h for a random cotangent u and a random w, on a few
    rows; where they differ (J(θ + hw)ᵀu − J(θ − hw)ᵀu)/2h. Where that differs too, normalisations are written in elementary
    operations and compared again.

    Args:
        evaluation: of the batch.
        beforehand: before the batch was recorded: where few rows can be had alone, for the operations that they have.

    Raises:
        ProblemError: they are not.
    """
    problem, structure = evaluation.problem, evaluation.snapshot.structure
    found = evaluation.operations
    if not problem.verify or problem.autocast is not None or (found <= structure.found.curved and not beforehand):
        return
    few = few_rows(evaluation)
    if beforehand and few is evaluation:
        return
    try:
        error = _curvature_error(few)
    except FAILURES:
        if beforehand:
            return
        if few is evaluation:
            raise
        few = evaluation  # a model that takes batches of one size
        error = _curvature_error(few)
    if error is not None and error <= ALLOWED and not found <= few.operations | structure.found.curved:
        few = evaluation
        error = _curvature_error(few)
    if error is not None and error > ALLOWED and not problem.model.composite:
        problem.model.composite = True
        error = _curvature_error(few)
        problem.model.composite = error is None or error <= ALLOWED
    if error is None:
        structure.found.notes["second derivatives"] = "no central difference: the model does not run in float64"
    elif error > ALLOWED:
        raise ProblemError(
            "the second derivatives of the model are wrong: the derivative of its gradient by double backward differs from a "
            f"central difference by {error:.1e}. Torch's formula for an operation is wrong, or a hook, a custom autograd "
            "Function (a straight-through estimator, a checkpoint) gives a gradient that is not a derivative. First-order "
            "matrices (ggn, covariance) need none; Problem(verify=False) leaves this check out"
        )
    structure.found.sworn.add("curvature")
    structure.found.curved |= few.operations if beforehand else found


def _curvature_error(evaluation: ModelCall) -> float | None:
    """The relative difference, the smallest over some directions; None where the model does not run in float64."""
    if widest(evaluation.problem.device) != torch.float64:
        return None
    smallest, sizes = math.inf, dict[float, float]()
    # What is detached is a constant, unlike what a Function computes: where both move, both are tried.
    for (seed, step), hold in itertools.product(enumerate(STEPS), (False, True)):
        try:
            found = _difference(evaluation, seed, step, hold=hold)
        except FAILURES:
            if set(evaluation.problem.layout.dtypes.values()) == {torch.float64}:
                raise
            return None
        if found is None:
            return None
        smallest = min(smallest, found.error)
        sizes[step] = min(sizes.get(step, math.inf), found.size)
        if smallest <= ALLOWED:
            return smallest
    if sizes[STEPS[-1]] > KINK * sizes[STEPS[0]]:
        beside = min(
            found.error
            for seed in range(len(STEPS))
            if (found := _difference(evaluation, seed, STEPS[-1], hold=False, aside=ASIDE)) is not None
        )
        if beside <= ALLOWED:
            evaluation.snapshot.structure.found.notes["second derivatives"] = (
                "the state lies on a kink (activations that are exactly zero before a ReLU), where torch chooses a side; they "
                "agree with a central difference beside it"
            )
            return beside
    return smallest


@dataclass(frozen=True)
class Difference:
    """A difference against double backward, on one side or central.

    Args:
        error: relative.
        size: norm of the difference.
    """

    error: float
    size: float


class Constants(TorchFunctionMode):
    """What a model takes for constants although it comes from the parameters: detached tensors, and all that is computed
    without gradients. A difference must hold them fixed as the derivative does.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: list[Tensor] = []
        self._next: int | None = None

    def taken(self) -> Constants:
        """A context around a call that remembers the constants."""
        self._next = None
        return self

    def given(self) -> Constants:
        """A context around another call that puts the remembered constants in their place."""
        self._next = 0
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or result.requires_grad or is_functorch_wrapped_tensor(result):
            return result
        if not any(isinstance(t, Tensor) and t.requires_grad for t in (*args, *(kwargs or {}).values())):
            return result
        if self._next is None:
            self._values.append(result.detach().clone())
            return result
        if self._next < len(self._values) and self._values[self._next].shape == result.shape:
            result = self._values[self._next].to(result.dtype)
        self._next += 1
        return result


def _difference(evaluation: ModelCall, seed: int, step: float, *, hold: bool, aside: float = 0.0) -> Difference | None:
    """The difference along one direction, for one step, on one side where that agrees; None where the model computes in less
    than float64.

    Args:
        evaluation: the batch.
        seed: of the direction.
        step: in units of the parameters' own size.
        hold: whether what is detached stays as it is.
        aside: how far from the state, along another direction.
    """
    call, values = evaluation.in_double(), evaluation.values()
    if aside:
        others = random_directions(evaluation, seed + len(STEPS), torch.float64)
        values = [
            value.to(torch.float64, copy=True).add_(v, alpha=aside * (size_of([value]) or 1.0))
            for value, v in zip(values, others, strict=True)
        ]
    w = random_directions(evaluation, seed, torch.float64)
    for v, value in zip(w, values, strict=True):
        v.mul_(size_of([value]) or 1.0)
    leaves = [value.to(torch.float64, copy=True).requires_grad_() for value in values]
    cut = Constants()
    with cut.taken():
        z = call(leaves)
    evaluation.operations = operations([z])
    if coarsest_dtype(z) != torch.float64:
        return None
    u = random_cotangent(z.detach(), seed)
    gradients = evaluation.differentiate(z, leaves, u)
    exact, here = _existing(backward(gradients, leaves, w), leaves), _existing(gradients, leaves)
    # Rounding of the gradient is that of its own size or, where it is zero but for rounding, of what cancels in it.
    natural = float(u.norm() * z.detach().norm()) / (size_of(values) or 1.0)
    noise = FLOOR * torch.finfo(torch.float64).eps / step * (norm_of(here) + natural) / ALLOWED
    del gradients, leaves, z

    def beside(sign: int) -> list[Tensor]:
        moved = [(v * (sign * step)).add_(value).requires_grad_() for value, v in zip(values, w, strict=True)]
        with cut.given() if hold else nullcontext():
            return _existing(backward([call(moved)], moved, [u]), moved)

    def compared(plus: list[Tensor], minus: list[Tensor], width: float) -> Difference:
        difference = [(p - m).div_(width) for p, m in zip(plus, minus, strict=True)]
        size = norm_of(difference)
        scale = norm_of(exact) + size + noise
        error = norm_of([d.sub_(e) for d, e in zip(difference, exact, strict=True)])
        return Difference(error / scale if scale else 0.0, size)

    ahead = beside(1)
    # The gradient of the state itself is there: the other side is only taken where that difference is not near enough.
    one_sided = compared(ahead, here, step)
    return one_sided if one_sided.error <= ALLOWED else compared(ahead, beside(-1), 2 * step)


def _existing(gradients: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that exist, detached, and zeros for the others."""
    return [torch.zeros_like(p) if g is None else g.detach() for g, p in zip(gradients, leaves, strict=True)]


def swear_symmetric(
    multiply: Callable[[Sequence[Tensor]], Sequence[Tensor | None]],
    evaluation: ModelCall,
    what: object,
    natural: Callable[[], float],
) -> None:
    """Check that vᵀ(A w) = wᵀ(A v) for the recorded product of a batch with a symmetric matrix.

    Args:
        multiply: a direction by parameter -> the product by parameter.
        evaluation: of the batch.
        what: the matrix, for messages.
        natural: the size of vᵀ(A w) for directions of the parameters' size, before anything cancels.

    Raises:
        ProblemError: it is not.
    """
    v, w = (random_directions(evaluation, seed) for seed in (4, 5))
    left, left_scale = dot_of([(x, y) for x, y in zip(v, multiply(w), strict=True) if y is not None])
    right, right_scale = dot_of([(x, y) for x, y in zip(w, multiply(v), strict=True) if y is not None])
    epsilon = evaluation.snapshot.structure.found.epsilon or torch.finfo(evaluation.problem.dtype).eps
    tolerance, error = epsilon**0.5, abs(left - right)
    if error <= tolerance * (left_scale + right_scale) or not math.isfinite(error):
        return  # the product itself reports what is not finite
    if not error <= FLOOR * tolerance**2 * natural() / (size_of(evaluation.values()) or 1.0) ** 2:
        raise ProblemError(
            f"the product with {what} is not symmetric (vᵀ(A w) = {left:.6g}, wᵀ(A v) = {right:.6g}), so that the second "
            "derivatives of the model are wrong at this state: torch's formula for an operation is wrong there, or a hook or a "
            "custom autograd Function alters gradients. First-order matrices (ggn, covariance) need none"
        )

"""A number with gradients that are computed when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvalg.errors import ProblemError
from curvalg.lowering.operators.live_form import DifferentiableSum
from curvalg.lowering.operators.third_order import form_gradient, further_leaves
from curvalg.problem import Problem, Snapshot


@dataclass(frozen=True)
class Part:
    """A part Σₖ lₖᵀ ∂A rₖ of a derivative.

    Args:
        matrix: A.
        left, right: l and r, (D, K).
    """

    matrix: DifferentiableSum
    left: Tensor
    right: Tensor


def number(
    value: Tensor,
    problem: Problem,
    snapshot: Snapshot,
    parts: Callable[[], Sequence[Part]],
    known: Sequence[tuple[Tensor, Callable[[], Tensor]]],
) -> Tensor:
    """The value as a tensor with gradients.

    Args:
        value: a scalar.
        problem, snapshot: that the derivative is of.
        parts: makes what is differentiated by third-order reverse mode.
        known: (tensor, what makes the gradient by it), such as a damping.
    """
    parameters = list(problem.model.chosen.values())
    others = further_leaves(problem, snapshot)

    def derivative() -> list[Tensor]:
        with problem.group.together("a gradient of curvature"):
            problem.check(snapshot)
            found = [form_gradient(part.matrix, problem, snapshot, part.left, part.right, others) for part in parts()]
            whole = torch.stack([part.parameters for part in found]).sum(0)
            own = problem.layout.unflatten(whole)
            by_others = [torch.stack(each).sum(0) for each in zip(*(part.others for part in found), strict=True)]
            return [*own.values(), *by_others, *(make() for _, make in known)]

    made: Tensor = _Number.apply(value, derivative, *parameters, *others, *(tensor for tensor, _ in known))
    return made


class _Number(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, derivative: Callable[[], list[Tensor]], *tensors: Tensor) -> Tensor:
        ctx.derivative = derivative
        ctx.kinds = [(t.dtype, t.shape) for t in tensors]
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # With create_graph=True; torch's own mark for such functions lets that pass where the incoming gradient is a constant.
        if torch.is_grad_enabled():
            raise ProblemError(
                "a gradient of curvature has no graph of its own, so that nothing can be differentiated through it (that would "
                "be a fourth derivative); leave out create_graph=True, and treat the gradient as a constant"
            )
        found = ctx.derivative()
        fitted = [(gradient * g).to(dtype).reshape(shape) for g, (dtype, shape) in zip(found, ctx.kinds, strict=True)]
        needed = ctx.needs_input_grad[2:]
        return None, None, *(g if needs else None for g, needs in zip(fitted, needed, strict=True))

"""The check that a model whose parameters lie in parts is differentiated right: through all exchanges, and twice.

Some operations drop their graph on the way back without an error, those that communicate more than others. Inner products are
sums over all processes, so that all of them come to the same verdict.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from curvalg.errors import ProblemError
from curvalg.problem.model_call import ModelCall
from curvalg.problem.verification.tangent_checks import random_cotangent
from curvalg.tensors.backward import backward
from curvalg.tensors.memory import widest

TOLERANCE = 1e-3
"""Of inner products relative to the lengths of their vectors; in double precision right ones are at 1e-6 and below."""
OATH = "parts"


def swear_parts(evaluation: ModelCall) -> None:
    """Check once a state, on the first batch of every process, ⟨u, Jv⟩ = ⟨Jᵀu, v⟩ and (∂ᵥJ)ᵀu against a central difference.

    All is in double precision, where the device has it and the model runs in it.

    Raises:
        ProblemError: first or second derivatives are wrong.
    """
    problem, sworn = evaluation.problem, evaluation.snapshot.sworn
    if not problem.compares or OATH in sworn:
        return
    in_double = widest(problem.device) == torch.float64
    call = evaluation.in_double() if in_double else lambda tensors: evaluation.run(tensors)[0]
    values = [t.double() if in_double else t for t in evaluation.values()]
    v, w = (_directions(evaluation, phase, values) for phase in (1.0, 0.7))
    weight = 0.0 if evaluation.sample.weightless else 1.0
    try:
        z, gradients, leaves, u = _gradients(call, values, weight, graph=True)
    except (ProblemError, RuntimeError, TypeError) as error:
        if (in_double and "torch.float" in str(error)) or "dtype" in str(error):
            sworn[OATH] = None, frozenset()
            return  # it casts inside, and so does not run in double precision on any process
        raise error
    *second, tangent = backward(gradients, [*leaves, u], v)
    here = torch.zeros((), dtype=z.dtype, device=z.device) if tangent is None else (u * tangent).sum().detach()
    along = float(problem.group.sum(here))
    gg, gv, vv, ww, hw, hh, tt = _products(
        evaluation,
        [(gradients, gradients), (gradients, v), (v, v), (w, w), (second, w), (second, second), (values, values)],
    )
    step = torch.finfo(z.dtype).eps ** (1 / 3) * max(tt, 1e-30) ** 0.5 / max(vv, 1e-30) ** 0.5
    sides = []
    for sign in (1, -1):
        moved = [t + sign * step * d for t, d in zip(values, v, strict=True)]
        sides.append(_gradients(call, moved, weight, graph=False)[1])
    differences = [None if a is None or b is None else (a - b) / (2 * step) for a, b in zip(*sides, strict=True)]
    dw, dd = _products(evaluation, [(differences, w), (differences, differences)])
    if abs(along - gv) > TOLERANCE * (gg * vv) ** 0.5:
        raise _wrong("first", along, gv)
    rounding = torch.finfo(z.dtype).eps * (gg * ww) ** 0.5 / step
    if abs(dw - hw) > TOLERANCE * (max(dd, hh) * ww) ** 0.5 + 100 * rounding:
        raise _wrong("second", hw, dw)
    sworn[OATH] = None, frozenset()  # not before: what fails on one process is checked anew by all


def _gradients(
    call: object, values: Sequence[Tensor], weight: float, *, graph: bool
) -> tuple[Tensor, list[Tensor | None], list[Tensor], Tensor]:
    """The output, Jᵀu for a fixed u, the leaves and u."""
    leaves = [t.detach().requires_grad_() for t in values]
    z: Tensor = call(leaves)  # type: ignore[operator]
    u = (weight * random_cotangent(z.detach())).requires_grad_(graph)
    return z, backward([z], leaves, [u], create_graph=graph), leaves, u


def _directions(evaluation: ModelCall, phase: float, like: Sequence[Tensor]) -> list[Tensor]:
    """A direction that is a function of the places of numbers, so that copies of a number have the same."""
    places = evaluation.problem.layout.places().to(torch.float64) + 1
    wave = torch.cos(phase * places) * (1 + 0.1 * torch.cos(0.01 * places))
    parts = wave.split([t.numel() for t in like])
    return [part.to(t.device, t.dtype).reshape(t.shape) for part, t in zip(parts, like, strict=True)]


def _products(
    evaluation: ModelCall, pairs: Sequence[tuple[Sequence[Tensor | None], Sequence[Tensor | None]]]
) -> list[float]:
    """Inner products over the numbers of all processes, each counted once."""
    problem = evaluation.problem
    found = []
    for left, right in pairs:
        products = [
            torch.zeros(n, device=problem.device) if a is None or b is None else (a * b).detach().reshape(-1)
            for a, b, n in zip(left, right, problem.layout.sizes, strict=True)
        ]
        joined = torch.cat([p.to(widest(problem.device)) for p in products])
        found.append(problem.layout.once(joined[None]).sum())
    return [float(t) for t in problem.group.vectors.sum(found)]


def _wrong(which: str, got: float, expected: float) -> ProblemError:
    return ProblemError(
        f"{which} derivatives of the model are wrong where its parameters lie in parts: an inner product is {got:.6g} where "
        f"{expected:.6g} is right. An operation that communicates has no right derivative (a hook, a custom autograd Function, "
        "a collective of torch.distributed inside forward). Take it out of forward, or make the Problem of a whole model on "
        "every process; Problem(verify=False) leaves this check out"
    )

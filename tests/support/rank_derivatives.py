"""Gradients of curvature on several processes, beside those of one process with all data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from curvalg import Problem, differentiable, registry
from tests.support.rank_faults import after, outcome
from tests.support.rank_quantities import SETUPS, SPLITS, columns
from tests.support.ranks import Failed

build = registry.build


def _matrix() -> Any:
    return build("ggn") + 0.5 * build("centered_covariance")


def _form(problem: Problem, damping: Tensor) -> Tensor:
    left, right = columns(problem.size, 2), columns(problem.size, 2, 1)
    return differentiable.quadratic_form(build("hessian"), problem, left, right, damping=damping)


NUMBERS: dict[str, Callable[[Problem, Tensor], Tensor]] = {
    "quadratic_form": _form,
    "trace": lambda p, d: differentiable.trace(build("hessian"), p, damping=d),
    "trace, probes": lambda p, d: differentiable.trace(_matrix(), p, damping=d, probes=4),
    "logdet": lambda p, d: differentiable.logdet(_matrix(), p, damping=d),
    "logdet, probes": lambda p, d: differentiable.logdet(build("ggn"), p, damping=d, probes=2),
    "top_eigenvalue": lambda p, d: differentiable.top_eigenvalue(build("hessian"), p, damping=d, tol=1e-12),
    "tic": lambda p, d: differentiable.tic(p, hessian=build("ggn"), damping=d),
}


Side = tuple[Problem, Tensor, Tensor, list[Any]]
"""A problem, a damping, what its loss depends on, and the model's parameters."""


def _side(loss: Callable[[Tensor], Any], params: Any = None, group: Any = None) -> Side:
    """The problem of one process with all data, or that of a group."""
    import torch.distributed as dist

    setup, own = SETUPS["weighted"], slice(None)
    if group is not None:
        own = slice(*SPLITS[dist.get_world_size(group)][dist.get_rank(group)])
    net, held = setup.model(), torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    problem = Problem(net, loss(held), setup.batches()[own], group=group, params=params)
    return problem, torch.tensor(0.3, dtype=torch.float64, requires_grad=True), held, list(net.parameters())


def differentiated(group: Any, name: str, *params: str) -> list[Tensor]:
    """A number and its gradients by damping, class weights and parameters."""
    problem, damping, weight, parameters = _side(lambda w: nn.CrossEntropyLoss(weight=w), list(params) or None, group)
    value = NUMBERS[name](problem, damping)
    (2 * value).backward()
    return [value.detach(), damping.grad, weight.grad, *(p.grad for p in parameters)]  # type: ignore[list-item]


@functools.cache
def differentiated_by_one(name: str, *params: str) -> list[Tensor]:
    """The same on one process with all data."""
    return differentiated(None, name, *params)


def tempered(group: Any) -> tuple[Any, float]:
    """The error of a gradient by a tensor that only graphs of batches show, or what is raised; and that of a product after."""

    def loss(held: Tensor) -> Any:
        return lambda z, y: nn.functional.cross_entropy(z * held, y, ignore_index=-100, reduction="sum")

    def attempt() -> float:
        found = []
        for shared in (None, group):
            problem, damping, held, _ = _side(loss, group=shared)
            NUMBERS["trace"](problem, damping).backward()
            found.append(held.grad)
        return float((found[1] - found[0]).norm() / found[0].norm())

    return outcome(attempt), after(group)


def different(group: Any) -> tuple[Any, float]:
    """What is raised where the ranks' losses depend on tensors of other numbers; and the error of a product after."""
    import torch.distributed as dist

    scale = torch.tensor(1.0 + dist.get_rank(group), dtype=torch.float64, requires_grad=True)
    problem = _side(lambda w: lambda z, y: (z * scale).square().sum(), group=group)[0]
    found = outcome(lambda: NUMBERS["trace"](problem, torch.tensor(0.3, dtype=torch.float64)))
    return (found if isinstance(found, Failed) else "no error"), after(group)


def explained(group: Any) -> str:
    """What a rank says about a matrix that is still to be made."""
    import torch.distributed as dist

    setup, rank, size = SETUPS["weighted"], dist.get_rank(group), dist.get_world_size(group)
    problem = Problem(setup.model(), setup.loss(), setup.batches()[slice(*SPLITS[size][rank])], group=group)
    return str(build("ekfac").lower(problem).explain())

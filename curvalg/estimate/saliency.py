"""Second-order scores of parameters: by how much the loss grows when they are removed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from curvalg.distributed.group import shared_call
from curvalg.errors import ExpressionError, FactsError, OptionError
from curvalg.estimate.result import Estimate, axes
from curvalg.estimate.target import require_operator
from curvalg.estimate.traces.diagonal import diagonal
from curvalg.expr import BlockDiagonal, Expr, Inverse, SquareRoot, Sum
from curvalg.lowering import CurvatureOperator
from curvalg.problem import Layout
from curvalg.problem.model import parameters as params_
from curvalg.problem.model.sharded import require_whole_vectors
from curvalg.tensors.memory import wide

Groups: TypeAlias = str | Mapping[str, Any] | None
"""None, "row", "parameter" or "module"; or names -> patterns of parameters, flat places, or a mask of all parameters."""

MOST = 4096
"""The most parameters of a group whose block of the inverse is made."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Saliency(Estimate):
    """Scores of single parameters or of groups of them.

    Args:
        value: predicted increase of the loss, float64: (D,) for single parameters, else one for each group.
        error: one standard error of each; 0 where it is exact.
        names: of the groups; of the parameters' tensors where every number has a score of its own.
        adjusted: whether the other parameters were free to make up for the removed ones.
        layout: of the parameters.
    """

    value: Tensor
    error: Tensor
    names: tuple[str, ...]
    adjusted: bool
    layout: Layout

    @property
    def findings(self) -> dict[str, str]:
        of = f"{len(self.names)} groups" if len(self.names) == len(self.value) else f"{len(self.value)} parameters"
        return {"scores of": of, **super().findings}

    def by_parameter(self) -> dict[str, Tensor]:
        """Scores of single parameters in the shapes of the model's; of groups, the score of each by its name."""
        if len(self.value) == self.layout.size and self.names == tuple(self.layout.names):
            return self.layout.unflatten(self.value)
        return dict(zip(self.names, self.value.unbind(), strict=True))

    def plot(self, ax: Any = None) -> Any:
        """Draw the scores of groups as bars, largest first, with their errors; of single parameters, their sums by tensor."""
        ax = axes(ax)
        scores = {name: (float(v.sum()), 0.0) for name, v in self.by_parameter().items()}
        if len(self.names) == len(self.value):
            scores = {n: (float(v), float(e)) for n, v, e in zip(self.names, self.value, self.error, strict=True)}
        order = sorted(scores, key=lambda name: scores[name][0])
        ax.barh(range(len(order)), [scores[n][0] for n in order], xerr=[scores[n][1] for n in order], color="C0")
        ax.set_yticks(range(len(order)), order)
        ax.set_xlabel("predicted increase of the loss")
        return ax


@shared_call
def saliency(
    op: CurvatureOperator, groups: Groups = None, *, products: int = 60, first_order: bool = False, seed: int = 0
) -> Saliency:
    """Predicted increase of the loss when parameters, or groups of them, are set to zero.

    With a curvature matrix A (``registry.build("ggn").lower(problem)``) and all other parameters held:

        ½ w_gᵀ A_gg w_g            (LeCun, Denker and Solla 1990, with A_gg the diagonal)

    With an inverse (``inverse(A + c * Identity).lower(problem)``), where the others move to make up for what is removed:

        ½ w_gᵀ ((A + c I)⁻¹_gg)⁻¹ w_g     (Hassibi and Stork 1992; Kurtic et al., arXiv 2203.07259, for groups)

    Both are of the quadratic model at a minimiser. One product a group of A; of an inverse its diagonal, or one solve for each
    parameter of a group.

    Args:
        op: an operator on all parameters of its problem, symmetric.
        groups: None scores every parameter by itself; "row" the rows of every tensor (the incoming weights of a unit, the
            filters of a convolution), "parameter" tensors, "module" modules; a mapping gives groups by name: patterns of names,
            flat places, or a boolean mask (D,).
        products: probes for the diagonal where it has to be estimated; then every score has an error.
        first_order: add −∇L_gᵀ w_g, for models that are not at a minimiser; of A alone.
        seed: of the probes.

    Returns:
        Saliency: ``value`` and ``error``, with ``plot()`` and ``by_parameter()``.

    Raises:
        ExpressionError: an operator of another kind, as one that is partly an inverse.
        OptionError: groups that do not fit, or ``first_order`` of an inverse.
        FactsError: the block of an inverse is not positive definite.

    >>> import torch
    >>> from curvalg import Identity, Problem, inverse, registry
    >>> problem = Problem(torch.nn.Linear(3, 2), torch.nn.MSELoss(), (torch.randn(9, 3), torch.randn(9, 2)))
    >>> op = inverse(registry.build("ggn") + 1e-3 * Identity).lower(problem)
    >>> saliency(op).by_parameter()["weight"].shape, saliency(op, "row").names
    (torch.Size([2, 3]), ('weight[0]', 'weight[1]', 'bias[0]', 'bias[1]'))
    """
    require_operator(op, "saliency")
    require_whole_vectors(op.problem, "saliency")
    problem, begin = op.problem, time.perf_counter()
    if op.shape != (problem.size, problem.size) or op.layout is None or op.facts.symmetric is False:
        raise ExpressionError(
            f"saliency: expected a symmetric operator on all {problem.size} parameters of its problem, got {op.expr} of shape "
            f"{op.shape}; for some of them make a Problem with params=..."
        )
    adjusted = _is_inverse(op)
    if first_order and adjusted:
        raise OptionError("saliency: first_order=True is for a curvature matrix, not for an inverse")
    weights = torch.cat([p.detach().reshape(-1) for p in problem.model.chosen.values()]).to(
        problem.device, problem.dtype
    )
    gradient = problem.gradient() if first_order else None
    if groups is None:
        found = diagonal(op, products=products, seed=seed)
        assert isinstance(found.value, Tensor)
        assert isinstance(found.error, Tensor)
        value, error = _single(wide(weights), found.value, found.error, adjusted)
        names, count = tuple(problem.layout.names), found.products
        if gradient is not None:
            value = value - wide(gradient * weights)
    else:
        chosen = _chosen(groups, problem.layout, problem.device)
        names, count = tuple(chosen), sum(map(len, chosen.values())) if adjusted else len(chosen)
        value = torch.stack([_group(op, weights, places, name, adjusted) for name, places in chosen.items()])
        error = torch.zeros_like(value)
        if gradient is not None:
            value = value - torch.stack([wide(gradient[at] * weights[at]).sum() for at in chosen.values()])
    return Saliency(
        method="exact" if not bool(error.any()) else found.method,
        products=count,
        seconds=time.perf_counter() - begin,
        converged=True,
        partial=False,
        value=value,
        error=error,
        names=names,
        adjusted=adjusted,
        layout=problem.layout,
    )


def _is_inverse(op: CurvatureOperator) -> bool:
    """Whether an operator is the inverse of a curvature matrix: as a whole, scaled, or block by block."""
    found = {_kind(op.expr.simplify(op.problem.facts))}
    if len(found) > 1 or None in found:
        raise ExpressionError(
            f"saliency: expected a curvature matrix or its inverse, but {op.expr} is made of both, or of roots; write it as "
            "inverse(A), or as A without an inverse in it"
        )
    return found == {True}


def _kind(expr: Expr) -> bool | None:
    """True for an inverse, False for a matrix without one in it, None for anything else."""
    if not any(isinstance(node, (Inverse, SquareRoot)) for node in expr.walk()):
        return False
    if isinstance(expr, Inverse) and not any(isinstance(n, (Inverse, SquareRoot)) for n in expr.expr.walk()):
        return True
    if isinstance(expr, Sum) and not expr.shift and len(expr.coefficients) == 1:
        return _kind(next(iter(expr.coefficients)))
    if isinstance(expr, BlockDiagonal):
        kinds = {_kind(child) for child in expr.children}
        return kinds.pop() if len(kinds) == 1 else None
    return None


def _single(weights: Tensor, entries: Tensor, error: Tensor, adjusted: bool) -> tuple[Tensor, Tensor]:
    """The scores of single parameters from the diagonal, with the errors that follow from its own."""
    squares = weights.square() / 2
    if not adjusted:
        return squares * entries, squares * error
    if bool((entries <= 0).any()):
        raise FactsError(
            f"saliency: {int((entries <= 0).sum())} entries of the diagonal of the inverse are not positive: the matrix is "
            "not positive definite, or its estimate is too rough; raise the damping, or products="
        )
    return squares / entries, squares * error / entries.square()


def _group(op: CurvatureOperator, weights: Tensor, places: Tensor, name: str, adjusted: bool) -> Tensor:
    """The score of one group."""
    own = wide(weights[places])
    if not adjusted:
        alone = torch.zeros_like(weights)
        alone[places] = weights[places]
        return own @ wide(op @ alone)[places] / 2
    if len(places) > MOST:
        raise OptionError(
            f"saliency: the group {name!r} has {len(places)} parameters, and the block of an inverse is made for {MOST} at "
            "most; take smaller groups, such as groups='row', or the matrix itself in place of its inverse"
        )
    block = wide(weights.new_empty(len(places), len(places)))
    for start in range(0, len(places), 64):
        part = places[start : start + 64]
        unit = torch.zeros(len(weights), len(part), dtype=weights.dtype, device=weights.device)
        unit[part, torch.arange(len(part), device=part.device)] = 1
        block[:, start : start + 64] = wide((op @ unit)[places])
    factor, failed = torch.linalg.cholesky_ex((block + block.T) / 2)
    if bool(failed):
        raise FactsError(f"saliency: the block of {name!r} of the inverse is not positive definite; raise the damping")
    return own @ torch.cholesky_solve(own[:, None], factor)[:, 0] / 2


def _chosen(groups: str | Mapping[str, Any], layout: Layout, device: torch.device) -> dict[str, Tensor]:
    """Names of groups -> flat places of their parameters."""
    every = torch.arange(layout.size, device=device)
    if isinstance(groups, Mapping):
        if not groups:
            raise OptionError("saliency: expected at least one group")
        return {str(name): _places(given, str(name), layout, every) for name, given in groups.items()}
    if groups == "parameter":
        return {name: every[at] for name, at in layout.slices.items()}
    if groups == "module":
        owners: dict[str, list[Tensor]] = {}
        for name, at in layout.slices.items():
            owners.setdefault(name.rpartition(".")[0] or name, []).append(every[at])
        return {name: torch.cat(parts) for name, parts in owners.items()}
    if groups == "row":
        return {
            f"{name}[{i}]": row
            for name, at in layout.slices.items()
            for i, row in enumerate(every[at].reshape(max(layout.shapes[name][:1].numel(), 1), -1))
        }
    raise OptionError(f"saliency: groups is None, 'row', 'parameter', 'module' or a mapping of names, got {groups!r}")


def _are_patterns(given: Any) -> bool:
    return isinstance(given, Sequence) and len(given) > 0 and all(isinstance(part, str) for part in given)


def _places(given: Any, name: str, layout: Layout, every: Tensor) -> Tensor:
    if isinstance(given, str) or _are_patterns(given):
        names = params_.match([given] if isinstance(given, str) else list(given), layout.names)
        return torch.cat([every[layout.slices[found]] for found in names])
    places = every[given] if isinstance(given, slice) else torch.as_tensor(given, device=every.device)
    if places.dtype == torch.bool and places.shape == every.shape:
        places = places.nonzero()[:, 0]
    whole = places.ndim == 1 and not places.is_floating_point() and places.dtype != torch.bool and len(places) > 0
    if not whole or int(places.min()) < 0 or int(places.max()) >= len(every) or len(places.unique()) != len(places):
        raise OptionError(
            f"saliency: the group {name!r} is a pattern of names, different places from 0 to {len(every) - 1}, or a mask of "
            f"{len(every)} truth values with one that is true"
        )
    return places

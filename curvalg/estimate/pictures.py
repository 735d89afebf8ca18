"""Pictures of whole matrices as heat maps."""

from __future__ import annotations

from typing import Any

from curvalg.errors import ProblemError
from curvalg.estimate.result import axes
from curvalg.estimate.target import require_operator
from curvalg.lowering import CurvatureOperator

MOST = 4096
"""Rows of a matrix that can still be seen."""
DECADES = 6
"""Powers of ten below the largest entry that have colours of their own."""


def heat_map(op: CurvatureOperator, ax: Any = None) -> Any:
    """Draw log₁₀ |Aᵢⱼ| of a small operator with lines between parameters, and return the matplotlib axes.

    Args:
        op: an operator of at most 4096 rows; its matrix is made.
        ax: matplotlib axes; new ones by default.

    Raises:
        ExpressionError: no curvature operator.
        ProblemError: more rows or columns than that.

    >>> import matplotlib as mpl
    >>> mpl.use("Agg")
    >>> import torch
    >>> from curvalg import Problem, registry
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> problem = Problem(net, torch.nn.MSELoss(), (torch.randn(6, 3), torch.randn(6, 2)))
    >>> axes = heat_map(registry.build("hessian").lower(problem))
    >>> [label.get_text() for label in axes.get_yticklabels()]
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    require_operator(op, "heat_map")
    if max(op.shape) > MOST:
        raise ProblemError(
            f"expected an operator of at most {MOST} rows to draw, but {op.expr} is {op.shape[0]} x {op.shape[1]}; "
            "restrict() it to a layer"
        )
    ax = axes(ax)
    size = op.to_dense().cpu().double().abs()
    top = float(size.max()) or 1.0
    shown = size.clamp_min(top * 10.0**-DECADES).log10()
    image = ax.imshow(
        shown.numpy(), cmap="magma", interpolation="nearest", aspect="equal" if op.shape[0] == op.shape[1] else "auto"
    )
    ax.figure.colorbar(image, ax=ax, label="log₁₀ |entry|", shrink=0.8)
    for axis, space in (("y", op._codomain), ("x", op._domain)):
        if space.layout is None:
            getattr(ax, f"set_{axis}label")("outputs")
            continue
        slices = space.layout.slices
        for at in list(slices.values())[1:]:
            (ax.axhline if axis == "y" else ax.axvline)(at.start - 0.5, color="white", linewidth=0.7)
        centres = [(at.start + at.stop - 1) / 2 for at in slices.values()]
        getattr(ax, f"set_{axis}ticks")(centres, list(slices), rotation=90 if axis == "x" else 0)
    ax.tick_params(length=0)
    return ax

"""The command ``curvalg landscape``: the loss along one or two directions through the parameters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from curvalg import parse
from curvalg.errors import ExpressionError, ProblemError
from curvalg.estimate import eigsh
from curvalg.problem import Problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDEST = 9
"""Points of a direction in the table of a plane."""
By: TypeAlias = Literal["tensor", "filter"]
PARTS: dict[By, str] = {"tensor": "parameter tensor", "filter": "filter (row of a weight) and vector"}
"""Parts on which random directions are as long as the parameters, in words."""


@dataclass(frozen=True)
class Landscape:
    """The loss on a line or a plane, L(θ + Σᵢ aᵢ dᵢ).

    Args:
        names: of the directions.
        steps: the values of each aᵢ, (points,).
        losses: (points,), or (points, points) with the first direction along the first axis.
        unit: what a step of 1 is, in words.
    """

    names: tuple[str, ...]
    steps: NDArray[np.floating]
    losses: NDArray[np.floating]
    unit: str


def eigen_directions(problem: Problem, expression: str, count: int, seed: int) -> tuple[list[str], list[Tensor]]:
    """Eigenvectors of the largest eigenvalues, of length 1, each (D,), the largest first; with names that say these.

    Args:
        problem: whose parameters they move.
        expression: of a symmetric operator on all of these.
        count: how many.
        seed: of the eigensolver.

    Raises:
        ExpressionError: an operator on something else.
    """
    op = parse(expression).lower(problem)
    if op.shape[1] != problem.size or op.expr.domain == "outputs":
        raise ExpressionError(
            f"a landscape moves all {problem.size} parameters, but {op.expr} acts on {op.shape[1]} numbers; take one on "
            "the parameters, and choose among them by --params"
        )
    values, vectors = eigsh(op, count, which="LA", seed=seed)
    if not bool(values.any()):
        raise ExpressionError(
            f"the largest eigenvalues of {op.expr} are zero, so every direction is an eigenvector; take another expression, or "
            "leave out --along for random directions"
        )
    names = [f"eigenvector of {float(value):.4g}" for value in values.flip(0)]
    return names, list(vectors.flip(1).T)


def random_directions(problem: Problem, count: int, seed: int, by: By) -> tuple[list[str], list[Tensor]]:
    """Normal random vectors, each (D,), that are as long as the parameters themselves on each tensor, or on each filter.

    d ← d ‖θ_i‖ / ‖d_i‖ for each part i; a filter is what makes one output, a row of a matrix, and tensors with one axis are one
    part (Li et al., Visualizing the loss landscape of neural nets, arXiv 1712.09913).

    Args:
        problem: whose parameters they move.
        count: how many.
        seed: of the random numbers.
        by: the parts.
    """
    draw = torch.Generator(device="cpu").manual_seed(seed)
    directions = []
    for _ in range(count):
        tree = {}
        for name, parameter in problem.model.chosen.items():
            noise = torch.randn(parameter.shape, generator=draw, device="cpu", dtype=torch.float64).to(parameter)
            axes = tuple(range(1 if by == "filter" and noise.ndim > 1 else 0, noise.ndim))
            tree[name] = noise * (_lengths(parameter.detach(), axes) / _lengths(noise, axes))
        directions.append(problem.layout.flatten(tree))
    return [f"random direction {number}" for number in range(1, count + 1)], directions


def _lengths(tensor: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The lengths of the parts that lie along some axes; without axes every number is a part."""
    return torch.linalg.vector_norm(tensor, dim=axes, keepdim=True) if axes else tensor.abs()


def scan(problem: Problem, directions: Sequence[Tensor], steps: NDArray[np.floating]) -> NDArray[np.floating]:
    """The loss at all points of a grid, one axis for each direction; the parameters are the same bits afterwards.

    Args:
        problem: with a loss.
        directions: each (D,).
        steps: along each of them, (points,).
    """
    losses = np.empty([len(steps)] * len(directions))
    with _restored(problem):
        for place in product(range(len(steps)), repeat=len(directions)):
            moves = [float(steps[i]) * direction for i, direction in zip(place, directions, strict=True)]
            with _restored(problem):
                losses[place] = problem.step(torch.stack(moves).sum(0), -1.0).value()
    return losses


@contextmanager
def _restored(problem: Problem) -> Iterator[None]:
    """A context after which the parameters are those from before."""
    before = {name: parameter.detach().clone() for name, parameter in problem.model.chosen.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in problem.model.chosen.items():
                parameter.copy_(before[name])


def landscape(
    problem: Problem, along: str | None, count: int, reach: float, points: int, seed: int, by: By = "tensor"
) -> Landscape:
    """The landscape that a command asks for.

    Args:
        problem: with a loss, and whole parameters on every process.
        along: the expression whose eigenvectors are the directions; None: random ones.
        count: of directions, 1 or 2.
        reach: steps go from −reach to reach.
        points: of a direction.
        seed: of random numbers.
        by: parts on which random directions are as long as the parameters.

    Raises:
        ProblemError: parameters in parts.
        ExpressionError: an expression whose eigenvectors are no directions.
    """
    if problem.group.sharded:
        raise ProblemError("a landscape needs whole parameters on every process; run it on a model that is not sharded")
    if along is None:
        names, directions = random_directions(problem, count, seed, by)
    else:
        names, directions = eigen_directions(problem, along, count, seed)
    steps = np.linspace(-reach, reach, points)
    unit = f"the length of each {PARTS[by]}" if along is None else "length 1"
    return Landscape(tuple(names), steps, scan(problem, directions, steps), unit)


def table(found: Landscape, problem: str) -> Group:
    """The losses as a table for people; of a plane only some points."""
    lines = [f"loss of {problem} along {' (down) and '.join(found.names)}{' (right)' * (len(found.names) - 1)}"]
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False)
    chosen = np.arange(len(found.steps))
    if found.losses.ndim == 2:
        chosen = np.unique(np.linspace(0, len(found.steps) - 1, min(WIDEST, len(found.steps))).round().astype(int))
    rows = found.losses[chosen] if found.losses.ndim == 1 else found.losses[np.ix_(chosen, chosen)]
    heads = ["loss"] if found.losses.ndim == 1 else [f"{step:.3g}" for step in found.steps[chosen]]
    for head in ("step", *heads):
        shown.add_column(head, justify="right")
    for step, row in zip(found.steps[chosen], rows, strict=True):
        shown.add_row(f"{step:.3g}", *(f"{loss:.5g}" for loss in np.atleast_1d(row)))
    return Group(Text(lines[0], style="bold"), Text(), shown, Text(), Text(f"a step of 1 is {found.unit}", style="dim"))


def as_json(found: Landscape, *, problem: str, seed: int) -> str:
    """All losses for programs."""
    record = {
        "problem": problem,
        "directions": list(found.names),
        "unit": found.unit,
        "seed": seed,
        "steps": found.steps.tolist(),
        "losses": found.losses.tolist(),
    }
    return json.dumps(record, indent=2)


def draw(found: Landscape, problem: str) -> Figure:
    """The line, or the plane as contours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(found.names[-1])
    if found.losses.ndim == 1:
        axes.plot(found.steps, found.losses, color="#0b3c5d", linewidth=2)
        axes.set_ylabel("loss")
        axes.spines[["top", "right"]].set_visible(False)
    else:
        filled = axes.contourf(found.steps, found.steps, found.losses, levels=24, cmap="viridis_r")
        figure.colorbar(filled, ax=axes, label="loss")
        axes.set_ylabel(found.names[0])
    axes.set_title(f"loss of {problem}", loc="left", fontsize=11, parse_math=False)
    return figure

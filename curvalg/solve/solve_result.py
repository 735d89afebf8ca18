"""The result of every solver: an iterate and a report for each column."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from curvalg.markup import card, picture, table

SHOWN = 8
"""Columns that a notebook shows of a solve."""
Matmul = Callable[[Tensor], Tensor]
"""X (n, K) -> A X (n, K), for any K."""

CONVERGED = "converged"
ROUNDING = "converged: what is left is rounding of the products"
"""The reason of a solve whose residual is above the tolerance, but as small as it can be."""
UNITS = 64
"""k of k ε (‖A‖ ‖x‖ + ‖b‖), what rounding of products may leave of a solve that is right, however A is conditioned (the
normwise backward error of Rigal and Gaches, J. ACM 1967)."""
LARGE = 1e-2
"""Residuals relative to ‖b‖ above which rounding tells more of x than b does: a direct solve warns, an iterative one fails."""


@dataclass(frozen=True)
class SolveResult:
    """The outcome of A x = b, one entry per column.

    Args:
        x: the solution or, where not converged, the iterate of the smallest residual seen; shape of b.
        converged: whether the true residual met the tolerance, shape (K,). Also where ‖b − A x‖ is no more than rounding of the
            products, a few units of ε (‖A‖ ‖x‖ + ‖b‖), of a direct solver and of an iterative one that gets no further: of an
            ill-conditioned matrix no x does better, and the residual relative to ‖b‖ may be larger than was asked for;
            ``reason`` says so then. Not of an iterative one whose tolerance was named.
        iterations: iterations spent, shape (K,); 0 for a direct solver.
        residual: true residual ‖b − A x‖, recomputed, shape (K,).
        reason: why each column ended.
        history: residual norms as the solver saw them, one row for each iteration (iterations + 1, K); a column that has ended
            keeps its last one. None for a direct solver.
        partial: whether the solve was interrupted.
    """

    x: Tensor
    converged: Tensor
    iterations: Tensor
    residual: Tensor
    reason: tuple[str, ...]
    history: Tensor | None = field(default=None, repr=False)
    partial: bool = False

    def plot(self, ax: Any = None) -> Any:
        """Draw how the residuals fell, on matplotlib axes (new ones by default), and return them.

        Raises:
            ValueError: a direct solver has no history.
        """
        if self.history is None:
            raise ValueError(
                "expected an iterative solve, but this one was direct: there is no residual history to draw"
            )
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        for column, norms in enumerate(self.history.T.cpu()):
            ended = int(self.iterations[column]) + 1
            ax.semilogy(
                range(ended), norms[:ended].tolist(), label=f"column {column}: {self.reason[column].split(':')[0]}"
            )
        ax.set_xlabel("iteration")
        ax.set_ylabel("residual ‖b − A x‖")
        if self.history.shape[1] <= 8:
            ax.legend(frameon=False)
        return ax

    @property
    def ok(self) -> bool:
        """Whether every column has converged."""
        return bool(self.converged.all())

    def __repr__(self) -> str:
        return f"SolveResult(x {tuple(self.x.shape)}; {self.summary()})"

    def _repr_html_(self) -> str:
        columns = ["column", "iterations", "residual", "ended"]
        told = zip(self.iterations.tolist(), self.residual.tolist(), self.reason, strict=True)
        rows = [[str(i), str(n), f"{norm:.3g}", why] for i, (n, norm, why) in enumerate(told)]
        below = table(columns, rows[:SHOWN]) + (f"<div>and {len(rows) - SHOWN} more</div>" if len(rows) > SHOWN else "")
        history = "" if self.history is None else picture(self.plot)
        return card("SolveResult", {"x": str(tuple(self.x.shape)), "columns": self.summary()}, below, history)

    def summary(self) -> str:
        """One line for messages: the columns that did not converge and why."""
        failed = [i for i, ok in enumerate(self.converged.tolist()) if not ok]
        if not failed:
            return f"all {len(self.reason)} columns converged in at most {int(self.iterations.max())} iterations"
        worst = max(failed, key=lambda i: float(self.residual[i]))
        reasons = sorted({self.reason[i] for i in failed})
        return (
            f"{len(failed)} of {len(self.reason)} columns did not converge ({'; '.join(reasons)}); the largest residual is "
            f"{float(self.residual[worst]):.2e} after {int(self.iterations[worst])} iterations"
        )

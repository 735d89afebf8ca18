"""The gradient of the loss as a function of the parameters: what terms that multiply by differences of gradients are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from curvalg.errors import ProblemError
from curvalg.problem.model.snapshot import Snapshot
from curvalg.problem.setting import Setting
from curvalg.tensors.bits import all_finite


class GradientField:
    """The gradient ∇L of the loss of all data at any parameters, and the space that it is a vector of.

    Vectors have shape (D,), in the order of the problem's layout and in the dtype of products. Where processes share a problem
    each calls this alike: gradients are of the data of all of them. Where parameters are sharded, vectors are the numbers of
    this process, and lengths those of the whole. The user's own model is not touched.

    Attributes:
        kept: what the term wants to keep at this state, by names of its own; empty at first.
        gradients: how many gradients were taken.

    Args:
        problem: the problem; of a sub-matrix, that over its parameters alone.
        snapshot: the state that it is around.
        gradient: the gradient at a state.
        kept: a dict of the state and the term.
    """

    def __init__(
        self, problem: Setting, snapshot: Snapshot, gradient: Callable[[Snapshot], Tensor], kept: dict[str, Any]
    ) -> None:
        self.kept = kept
        self.gradients = 0
        self._problem, self._snapshot, self._gradient = problem, snapshot, gradient

    @property
    def parameters(self) -> Tensor:
        """The parameters θ of the state, a copy."""
        problem, state = self._problem, self._snapshot.state
        return problem.layout.gather([state[name] for name in problem.layout.names], problem.device).detach().clone()

    @property
    def here(self) -> Tensor:
        """The gradient ∇L(θ) at the state itself, computed once; not to be written into.

        Raises:
            ProblemError: it is not finite.
        """
        return self._problem.cached(self._snapshot).get("gradient", None, lambda: self._at(self._snapshot))

    def at(self, parameters: Tensor) -> Tensor:
        """The gradient ∇L at other parameters, which are rounded to the dtypes of the model's own.

        Raises:
            ProblemError: it is not finite there.
        """
        _ = self.here  # what is found out of a model once is found out at the state itself
        layout = self._problem.layout
        moved = dict(zip(layout.names, layout.tangents(parameters), strict=True))
        return self._at(self._snapshot.moved(moved))

    def _at(self, snapshot: Snapshot) -> Tensor:
        found = self._gradient(snapshot).detach()
        self.gradients += 1
        if not all_finite(found):
            where = "" if snapshot is self._snapshot else " at other parameters than those of the model"
            raise ProblemError(
                f"the gradient of the loss is not finite (NaN or infinite){where}; look for targets, weights or outputs that "
                "are not finite, or take smaller steps"
            )
        return found

    def norm(self, vector: Tensor) -> float:
        """The Euclidean length of a vector (D,), over all processes."""
        return float(self._problem.vectors.lengths(vector[None])[0])

    def random(self, seed: int) -> Tensor:
        """Independent standard normal numbers (D,), the same for a seed in every call and on every device."""
        problem = self._problem
        return problem.vectors.normals(f"gradients {seed}", 0, 1)[0].to(problem.dtype).to(problem.device)

    @property
    def epsilon(self) -> float:
        """The relative rounding error of one number, among the dtypes of the parameters and of the model's arithmetic."""
        problem = self._problem
        dtypes = {*problem.layout.dtypes.values(), *(() if problem.autocast is None else (problem.autocast,))}
        found = self._snapshot.structure.found.epsilon or 0.0
        return max(found, *(float(torch.finfo(dtype).eps) for dtype in dtypes))

"""The check that kept inputs and deltas are the columns V, by one backward pass a batch: V y, and ⟨y, Vᵀx⟩ = ⟨V y, x⟩."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from curvalg.problem import Layout
from curvalg.problem.layers.recorded import RecordedLayers
from curvalg.tensors.backward import backward
from curvalg.tensors.clock import timed
from curvalg.tensors.random_numbers import normals


class AdjointCheck:
    """What a factor is compared with while it is recorded: V y by ordinary backward passes, for one random y.

    It costs less than a product, and holds for any groups of the parameters: the blocks of V y are what the groups give.

    Args:
        layout: of the parameters.
        device: where they are.

    Attributes:
        seconds: that the backward passes took, one a batch.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._layout, self._device = layout, device
        self._total = torch.zeros(layout.size, dtype=layout.dtype, device=device)
        self._weights: list[Tensor] = []
        self.seconds = 0.0

    def add(self, recorded: RecordedLayers, columns: Tensor) -> None:
        """Take one more batch, with the cotangents s of its columns (K, *output.shape)."""
        count, rows = columns.shape[:2]
        dtype = self._total.dtype
        y = normals((count, rows), len(self._weights)).to(self._device, dtype)
        weights = y.reshape(count, rows, *[1] * (columns.ndim - 2)).to(columns.dtype)
        mixed = (weights * columns).sum(0)

        def pull() -> list[Tensor | None]:
            return backward([recorded.z], list(recorded.leaves.values()), [mixed], retain_graph=True)

        seconds, gradients = timed(pull, self._device)
        self.seconds += seconds
        self._total += self._layout.gather(gradients, self._device)
        self._weights.append(y.reshape(-1))

    def wrong(self, push: Callable[[Tensor], Tensor], pull: Callable[[Tensor], Tensor], groups: int) -> str | None:
        """Why the kept columns must not be used, or None.

        Args:
            push: X (D, P) -> V_gᵀ X_g by group of parameters (groups, M, P), from what is kept.
            pull: Y (groups, M, P) -> V_g Y_g, together (D, P), from what is kept.
            groups: their number.
        """
        y, dtype = torch.cat(self._weights), self._total.dtype
        pulled = pull(y[None, :, None].expand(groups, -1, 1))[:, 0]
        if not bool((pulled - self._total).norm() <= torch.finfo(dtype).eps ** 0.5 * self._total.norm()):
            return "its columns differ from gradients"
        x = normals((self._layout.size, 1), 0).to(self._device, dtype)
        pushed = push(x).sum(0)[:, 0]
        # One number, of which much cancels: it is compared in units of its rounding, not of its own size.
        left, right = y @ pushed, pulled @ x[:, 0]
        scale = y.norm() * pushed.norm() + pulled.norm() * x.norm()
        close = bool((left - right).abs() <= torch.finfo(dtype).eps ** 0.75 * scale)
        return None if close else "its products differ from gradients"

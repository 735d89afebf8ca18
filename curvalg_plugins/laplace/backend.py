"""Curvature for laplace-torch, where it is installed: ``Laplace(model, "classification", backend=CurvalgGGN)``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from curvalg import Batch, ExpressionError, MatrixBlock, OptionError, Problem, registry

try:
    from laplace.curvature import GGNInterface
    from laplace.utils import Kron
except ImportError as error:
    raise ImportError(
        "curvalg_plugins.laplace.backend is for laplace-torch; install it with pip install laplace-torch"
    ) from error

WIDTH = 32
"""Outputs of every row that are taken through the network at a time."""


class CurvalgGGN(GGNInterface):
    """GGN, its diagonal, KFAC and Jacobians of laplace-torch, computed here.

    A backend for every structure of ``laplace.Laplace`` ("full", "kron", "diag", "lowrank", "gp"), for all weights, the last
    layer or a subnetwork; the numbers are those of ``CurvlinopsGGN``, also of layers that its KFAC does not have (embeddings,
    normalisations, attention), whose parameters get exact blocks where they are small. Gradients by the inputs
    (``enable_backprop=True``) are left to torch.func. Daxberger et al., arXiv 2106.14806.

    Args:
        model: as of ``laplace.curvature.GGNInterface``, and so all others; ``stochastic`` is refused.

    Raises:
        OptionError: ``stochastic=True``, whose draws are not those of laplace-torch.
    """

    def __init__(self, model: torch.nn.Module, likelihood: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, likelihood, *args, **kwargs)
        if self.stochastic:
            raise OptionError("CurvalgGGN is exact; leave stochastic=True out, or take laplace.curvature.CurvlinopsGGN")
        self._problem: Problem | None = None
        self._inputs: Problem | None = None

    @property
    def _names(self) -> list[str]:
        chosen = {id(p) for p in self.params}
        return [name for name, p in self.model.named_parameters() if id(p) in chosen]

    def _on(self, x: Any, y: Tensor) -> Problem:
        """The problem of a batch; what was verified on the first holds for all."""
        if self._problem is None:
            self._problem = Problem(self.model, self.lossfunc, (x, y), params=self._names, cache=0)
            return self._problem
        return self._problem.with_data((x, y))

    def _loss(self, problem: Problem) -> Tensor:
        return torch.tensor(self.factor * problem.value(), dtype=problem.dtype, device=problem.device)

    def full(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss and the GGN of a batch, (D, D)."""
        problem = self._on(x, y)
        matrix = self.factor * registry.build("ggn").lower(problem).to_dense()
        if (chosen := self.subnetwork_indices) is not None:
            matrix = matrix[chosen][:, chosen]
        return self._loss(problem), matrix

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The loss and the diagonal of the GGN of a batch, (D,)."""
        problem = self._on(x, y)
        values: Tensor = self.factor * registry.build("ggn_diagonal").lower(problem).exact("diagonal")
        values = values.to(problem.dtype)
        return self._loss(problem), values if self.subnetwork_indices is None else values[self.subnetwork_indices]

    def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Any]:
        """The loss and KFAC of a batch of n of N rows, weight and bias apart; inputs are weighted by n / N.

        Options of ``registry.build("kfac", ...)`` may be passed on, such as ``approximation="reduce"``.
        """
        problem = self._on(x, y)
        blocks = registry.build("kfac", joint=False, **kwargs).lower(problem).structure
        factors: list[list[Tensor]] = []
        for block in sorted(blocks, key=lambda block: int(block.rows.min())):
            found = _factors(block)
            if len(found) == 2:
                found[1] = found[1] * (problem.num_samples / N)
            factors.append(found)
        return self._loss(problem), self.factor * Kron(factors)

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """Jacobians (n, C, D) of the outputs of a batch, and the outputs (n, C)."""
        if enable_backprop:
            result: tuple[Tensor, Tensor] = super().jacobians(x, enable_backprop=True)
            return result
        if self._inputs is None:
            self._inputs = Problem(self.model, None, x, params=self._names, cache=0)
        with self._inputs.with_inputs(x).batches() as batches:
            (batch,) = batches
            found = _rows(batch, list(self._inputs.layout.names))
            outputs = batch.output
        return found if self.subnetwork_indices is None else found[:, :, self.subnetwork_indices], outputs


def _factors(block: MatrixBlock) -> list[Tensor]:
    """Kronecker factors of the block of one parameter; one where there is no more.

    Raises:
        ExpressionError: it is several products.
    """
    if block.kind == "dense":
        return [block.scale * block.factors[0]]
    if block.kind != "kronecker" or block.factors[0].ndim > 2 or bool((block.rows.diff() < 0).any()):
        raise ExpressionError(
            f"laplace-torch has one Kronecker product a parameter, but {', '.join(block.params)} has other blocks (a "
            'grouped or transposed layer); take hessian_structure="diag" or curvalg_plugins.laplace.laplace'
        )
    output, inputs = block.factors
    if inputs.numel() == 1:
        return [block.scale * output * inputs]
    return [block.scale * output, inputs]


def _rows(batch: Batch, names: list[str]) -> Tensor:
    """The Jacobians of the outputs of all rows of a batch (n, C, D)."""
    z = batch.output
    numbers = math.prod(z.shape[1:])
    units = torch.eye(numbers, dtype=z.dtype, device=z.device).reshape(numbers, 1, *z.shape[1:])
    parts = []
    for at in range(0, numbers, WIDTH):
        some = units[at : at + WIDTH]
        found: dict[str, Tensor] = {}
        for record in batch.layers(some.expand(len(some), *z.shape)):
            found |= record.explicit()
        parts.append(torch.cat([found[name].flatten(2) for name in names], 2))
    return torch.cat(parts).transpose(0, 1)

"""EKFAC: the eigenbasis of KFAC, with the true second moments in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from curvalg import Block, Eigenbasis, Expr, Kronecker, block_diagonal
from curvalg_plugins.kronecker.kfac import LayerFactors
from curvalg_plugins.kronecker.options import Approximation, Fisher, Rest, Stats, check_draws

if TYPE_CHECKING:
    from torch import Tensor

    from curvalg import Batch, Layout


@dataclass(frozen=True)
class EKFAC(LayerFactors):
    r"""Eigenvalue-corrected KFAC: for each layer Q diag(λ) Qᵀ with Q = Q_B ⊗ Q_A from KFAC's factors (D × D).

    λ_ij = Σ over samples and columns of [(Q_Bᵀ dW Q_A)_ij]², with dW = Σ_t δ hᵀ the gradient of one column: of all diagonal
    matrices in that basis the one nearest to the true block. George et al., arXiv 1806.03884. Two passes over the data.

    Args:
        fisher: as of :class:`~curvalg_plugins.kronecker.KFAC`, and so all others.
        approximation: of the factors that give the basis.
        joint: a weight and its bias in one block.
        rest: parameters without Kronecker factors.
        samples: draws per sample, for "mc" alone.
        seed: of the draws, for "mc" alone.

    Raises:
        ExpressionError: an unknown option.
        ProblemError: parameters without factors and rest="refuse".
    """

    fisher: Fisher = "exact"
    approximation: Approximation = "expand"
    joint: bool = True
    rest: Rest = "refuse"
    samples: int = 1
    seed: int = 0
    passes: ClassVar[int] = 2
    name: ClassVar[str] = "ekfac"
    symbol: ClassVar[str] = r"K_{\mathrm{E}}"

    @property
    def columns(self) -> tuple[Fisher, int, int]:
        return self.fisher, self.samples, self.seed

    def __post_init__(self) -> None:
        self._check()
        check_draws(self.label, *self.columns)

    def prepare(self, batch: Batch) -> Stats:
        return self.layer_factors(batch)

    def accumulate(self, batch: Batch, prepared: Any = None) -> Stats:
        from curvalg_plugins.kronecker import factors  # needs torch

        moments: dict[tuple[str, ...], Stats] = {}
        for records in factors.layers_in_parts(batch, *self.columns):
            for record in records:
                if record.kind == "zero" or not factors.factored(record):
                    continue
                output, inputs = self._bases(self._layer(prepared, record.params))
                h, d = factors.inputs_and_deltas(record)
                found = {"weight": factors.second_moments(h, d, output, inputs)}
                if record.bias is not None and not self.joint:
                    found["bias"] = (d.sum(2) @ output).square().sum((0, 1))
                before = moments.get(record.params)
                moments[record.params] = found if before is None else {k: before[k] + found[k] for k in found}
        return {"moments": moments}

    @staticmethod
    def _layer(prepared: Stats, params: tuple[str, ...]) -> Stats:
        layer: Stats = prepared["inputs first" if params in prepared["inputs first"] else "layers"][params]
        return layer

    def _bases(self, layer: Stats) -> tuple[Tensor, Tensor]:
        """The bases Q_B and Q_A; found for the first batch and left with the statistics for the others."""
        if "bases" not in layer:
            from curvalg_plugins.kronecker import factors  # needs torch

            layer["bases"] = tuple(factors.eigenvectors(matrix) for matrix in self.means(layer))
        output, inputs = layer["bases"]
        return output, inputs

    def finish(self, stats: Stats, layout: Layout, prepared: Any = None) -> Expr:
        blocks = self.blocks_of_others(prepared["others"])
        for params, moments in stats["moments"].items():
            output, inputs = self._bases(self._layer(prepared, params))
            weight, *bias = params
            matrix = Eigenbasis(Kronecker(output, inputs), moments["weight"].reshape(-1))
            first = params in prepared["inputs first"]
            if first:
                matrix = Eigenbasis(Kronecker(inputs, output), moments["weight"].T.reshape(-1))
            if self.joint or not bias:
                blocks.append(Block(params, matrix, joint=bool(bias) and not first))
            else:
                blocks += [Block((weight,), matrix), Block((bias[0],), Eigenbasis(output, moments["bias"]))]
        return block_diagonal(blocks)

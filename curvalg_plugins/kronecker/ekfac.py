"""EKFAC: the eigenbasis of KFAC, with the true second moments in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from curvalg import Eigenbasis, Expr, block_diagonal
from curvalg_plugins.kronecker.layer_factors import Layer, LayerFactors
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
        ProblemError: as of :class:`~curvalg_plugins.kronecker.KFAC`.
    """

    fisher: Fisher = "exact"
    approximation: Approximation = "expand"
    joint: bool = True
    rest: Rest = "small"
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

        moments: dict[Layer, Stats] = {}
        for records in factors.layers_in_parts(batch, *self.columns):
            for layer, pair in self._sorted(records)[0]:
                output, inputs = self._bases(prepared["layers"][layer])
                found = {"weight": factors.group_moments(pair, output, inputs)}
                if layer.bias is not None and not self.joint:
                    found["bias"] = factors.bias_moments(pair, output)
                before = moments.get(layer)
                moments[layer] = found if before is None else {k: before[k] + found[k] for k in found}
        return {"moments": moments}

    def _bases(self, layer: Stats) -> tuple[Tensor, Tensor]:
        """The bases Q_B and Q_A; found for the first batch and left with the statistics for the others."""
        if "bases" not in layer:
            from curvalg_plugins.kronecker import factors  # needs torch

            layer["bases"] = tuple(factors.eigenvectors(matrix) for matrix in self.means(layer))
        output, inputs = layer["bases"]
        return output, inputs

    def finish(self, stats: Stats, layout: Layout, prepared: Any = None) -> Expr:
        from curvalg_plugins.kronecker import factors  # needs torch

        blocks = self.blocks_of_others(prepared["others"], layout)
        for parts, (weight, *bias), missing in self.weights(prepared["layers"], prepared["others"], layout):
            bases = [self._bases(prepared["layers"][part]) for part in parts]
            output, inputs = (factors.extended(list(stack), missing, unit=True) for stack in zip(*bases, strict=True))

            def moments(of: str, parts: Sequence[Layer] = parts, missing: int = missing) -> Tensor:
                return factors.extended([stats["moments"][part][of] for part in parts], missing)

            blocks.append(weight.block(Eigenbasis(weight.kronecker(output, inputs), weight.values(moments("weight")))))
            for place in bias:
                basis = place.kronecker(output, factors.units(len(output), 1, output))
                blocks.append(place.block(Eigenbasis(basis, place.values(moments("bias")))))
        return block_diagonal(blocks)

"""EKFAC: the eigenbasis of KFAC, with the true second moments in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from curvalg import Eigenbasis, Expr, block_diagonal
from curvalg_plugins.kronecker.layer_factors import Layer, LayerFactors
from curvalg_plugins.kronecker.options import Approximation, Fisher, Rest, Stats, check_draws, check_options

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
        eigh_dtype: "own" decomposes the factors in their own precision, "float64" in double (the bases are rounded to their own
            precision in either case): in float32, eigenvectors of close eigenvalues come out less orthogonal. Inverses, square
            roots and spectra of KFAC and of all other structured matrices are always found in float64.

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
    eigh_dtype: Literal["own", "float64"] = "own"
    passes: ClassVar[int] = 2
    name: ClassVar[str] = "ekfac"
    symbol: ClassVar[str] = r"K_{\mathrm{E}}"

    @property
    def columns(self) -> tuple[Fisher, int, int]:
        return self.fisher, self.samples, self.seed

    def __post_init__(self) -> None:
        self._check()
        check_draws(self.label, *self.columns)
        check_options(self.label, eigh_dtype=(self.eigh_dtype, ("own", "float64")))

    def prepare(self, batch: Batch) -> Stats:
        return self.layer_factors(batch)

    def settle(self, prepared: Any) -> Stats:
        from curvalg.distributed import dealt
        from curvalg_plugins.kronecker import factors  # needs torch

        double, layers = self.eigh_dtype == "float64", prepared["layers"]
        means = [mean for layer in layers.values() for mean in self.means(layer)]
        costs = [float(len(mean)) * mean.shape[-1] ** 3 for mean in means]
        bases = iter(dealt([partial(factors.eigenvectors, mean, double) for mean in means], costs))
        settled = {
            layer: {**stats, "bases": (next(bases), next(bases)), "unit inputs": factors.is_diagonal(inputs)}
            for (layer, stats), inputs in zip(layers.items(), means[1::2], strict=True)
        }
        return {**prepared, "layers": settled}

    def accumulate(self, batch: Batch, prepared: Any = None) -> Stats:
        from curvalg_plugins.kronecker import factors  # needs torch

        moments: dict[Layer, Stats] = {}
        for records in factors.layers_in_parts(batch, *self.columns):
            for layer, pair in self._sorted(records)[0]:
                output, inputs = prepared["layers"][layer]["bases"]
                plain = prepared["layers"][layer]["unit inputs"] and inputs.shape[-1] == pair.inputs.shape[-1]
                found = {"weight": factors.group_moments(pair, output, None if plain else inputs)}
                if layer.bias is not None and not self.joint:
                    found["bias"] = factors.bias_moments(pair, output)
                before = moments.get(layer)
                moments[layer] = found if before is None else {k: before[k] + found[k] for k in found}
        return {"moments": moments}

    def finish(self, stats: Stats, layout: Layout, prepared: Any = None) -> Expr:
        from curvalg_plugins.kronecker import factors  # needs torch

        blocks = self.blocks_of_others(prepared["others"], layout)
        for parts, (weight, *bias), missing in self.weights(prepared["layers"], prepared["others"], layout):
            bases = [prepared["layers"][part]["bases"] for part in parts]
            output, inputs = (factors.extended(list(stack), missing, unit=True) for stack in zip(*bases, strict=True))

            def moments(of: str, parts: Sequence[Layer] = parts, missing: int = missing) -> Tensor:
                return factors.extended([stats["moments"][part][of] for part in parts], missing)

            blocks.append(weight.block(Eigenbasis(weight.kronecker(output, inputs), weight.values(moments("weight")))))
            for place in bias:
                basis = place.kronecker(output, factors.units(len(output), 1, output))
                blocks.append(place.block(Eigenbasis(basis, place.values(moments("bias")))))
        return block_diagonal(blocks)

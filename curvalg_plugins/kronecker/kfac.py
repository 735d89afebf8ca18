"""KFAC and FOOF: one Kronecker product for each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from curvalg import Expr, OptionError, block_diagonal
from curvalg_plugins.kronecker.layer_factors import LayerFactors
from curvalg_plugins.kronecker.options import Approximation, Fisher, Rest, Stats, check_draws

if TYPE_CHECKING:
    from torch import Tensor

    from curvalg import Batch, Layout


@dataclass(frozen=True)
class KFAC(LayerFactors):
    r"""Kronecker-factored approximate curvature: a block B ⊗ A for each linear layer and convolution (D × D).

    With layer inputs h (a one appended for the bias if ``joint``) and output deltas δ of the columns of curvature in output
    space, at the T positions that share the weights: A = mean of h hᵀ over samples and positions, B = Σ δ δᵀ ("expand"); or A =
    mean of h̄ h̄ᵀ, h̄ = T⁻¹ Σ_t h, and B = Σ δ̄ δ̄ᵀ, δ̄ = Σ_t δ ("reduce"). Everything carries the shares of the loss, so the blocks
    approximate those of ``ggn`` ("exact", "mc") or ``covariance`` ("empirical") without further scaling. Exact for deep linear
    networks with squared loss. Martens and Grosse, arXiv 1503.05671; Grosse and Martens, arXiv 1602.01407 (convolutions);
    Eschenhagen et al., arXiv 2311.00636 (expand and reduce).

    "expand" is exact for a linear layer whose positions contribute to the loss one by one, as tokens with a loss each; "reduce"
    where a network averages over the positions, as convolutions before pooling often do.

    ``kfac + c * Identity`` has an exact inverse, square root, trace and log-determinant.

    Args:
        fisher: "exact" columns of the loss Hessian's square root, "mc" draws of them, or "empirical" gradients.
        approximation: "expand" or "reduce", see above.
        joint: a weight and its bias in one block; otherwise a block each.
        rest: parameters without Kronecker factors: scales and shifts of normalisations, tables of more than 4096 rows, weights
            that are used in several ways (an embedding that is the head as well) or in a function that is not linear in them.
            "small" gives those of at most 1024 numbers their exact block, weight and bias of a normalisation in one if
            ``joint``, and refuses larger ones by name; "refuse" refuses all, "diagonal" gives each its exact diagonal, "exact"
            its exact block.
        samples: draws per sample, for "mc" alone.
        seed: of the draws, for "mc" alone.
        factored_damping: c > 0 damps the factors, (B + √c/π I) ⊗ (A + π √c I), which only approximates + c * Identity (Martens
            and Grosse, §6.3). A bias in a block of its own is damped exactly, B + c I.

    Raises:
        ExpressionError: an unknown option.
        ProblemError: parameters without factors that ``rest`` has no rule for, each with the reason.

    A grouped convolution has a pair of factors for each group, and a packed weight whose parts multiply inputs of their own one
    for each part; a learned table of positions and a bias alone have one factor for their outputs.

    >>> import torch
    >>> from curvalg import Identity, Problem, inverse, registry
    >>> data = (torch.randn(9, 3), torch.randn(9, 2))
    >>> problem = Problem(torch.nn.Linear(3, 2), torch.nn.MSELoss(), data)
    >>> kfac, ggn = registry.build("kfac"), registry.build("ggn")
    >>> bool(((kfac - ggn).lower(problem) @ torch.ones(8)).abs().max() < 1e-5)
    True
    >>> print(inverse(kfac + 1e-3 * Identity))
    inverse(kfac + 0.001*identity)
    """

    fisher: Fisher = "exact"
    approximation: Approximation = "expand"
    joint: bool = True
    rest: Rest = "small"
    samples: int = 1
    seed: int = 0
    factored_damping: float = 0.0
    name: ClassVar[str] = "kfac"
    symbol: ClassVar[str] = r"K"

    @property
    def columns(self) -> tuple[Fisher, int, int]:
        return self.fisher, self.samples, self.seed

    def __post_init__(self) -> None:
        self._check()
        check_draws(self.label, *self.columns)
        if not 0 <= self.factored_damping < float("inf"):
            raise OptionError(f"kfac: factored_damping is a finite number ≥ 0, got {self.factored_damping!r}")

    def accumulate(self, batch: Batch, prepared: None = None) -> Stats:
        return self.layer_factors(batch)

    def finish(self, stats: Stats, layout: Layout, prepared: None = None) -> Expr:
        from curvalg_plugins.kronecker import factors  # needs torch

        blocks = self.blocks_of_others(stats["others"], layout)
        for parts, (weight, *bias), missing in self.weights(stats["layers"], stats["others"], layout):
            means = [self.means(stats["layers"][part]) for part in parts]
            output, inputs = (factors.extended(list(stack), missing) for stack in zip(*means, strict=True))
            blocks.append(weight.block(weight.kronecker(*self._damped(output, inputs))))
            # A bias by itself has one factor, which takes the whole damping.
            blocks += [place.block(place.kronecker(*self._shifted(output))) for place in bias]
        return block_diagonal(blocks)

    def _damped(self, output: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        if not self.factored_damping:
            return output, inputs
        from curvalg_plugins.kronecker import factors  # needs torch

        return factors.split_damping(output, inputs, self.factored_damping)

    def _shifted(self, output: Tensor) -> tuple[Tensor, Tensor]:
        from curvalg_plugins.kronecker import factors  # needs torch

        return factors.damped(output, self.factored_damping), factors.units(len(output), 1, output)


@dataclass(frozen=True)
class FOOF(LayerFactors):
    """Forward-only Kronecker approximation: I ⊗ A for each layer, with A the mean of h hᵀ over samples and positions (D × D).

    The output factor of :class:`KFAC` replaced by the identity; parameters without factors get theirs from the gradient
    covariance, as of ``fisher="empirical"``, so that a loss is needed. Its
    scale is not that of the GGN (on a trained network it can be ten times as large): choose a damping or step size for it.
    Benzing, arXiv 2201.12250.

    Args:
        approximation: as of :class:`KFAC`.
        joint: as of :class:`KFAC`.
        rest: as of :class:`KFAC`.

    Raises:
        ExpressionError: as of :class:`KFAC`, and so ProblemError.
    """

    approximation: Approximation = "expand"
    joint: bool = True
    rest: Rest = "small"
    name: ClassVar[str] = "foof"
    symbol: ClassVar[str] = r"\mathrm{FOOF}"

    def __post_init__(self) -> None:
        self._check()

    def accumulate(self, batch: Batch, prepared: None = None) -> Stats:
        return self.layer_factors(batch)

    def finish(self, stats: Stats, layout: Layout, prepared: None = None) -> Expr:
        from curvalg_plugins.kronecker import factors  # needs torch

        blocks = self.blocks_of_others(stats["others"], layout)
        for parts, (weight, *bias), missing in self.weights(stats["layers"], stats["others"], layout):
            means = [self.means(stats["layers"][part]) for part in parts]
            inputs = factors.extended([a for _, a in means], missing)
            ones = factors.units(len(inputs), means[0][0].shape[-1], inputs)
            blocks.append(weight.block(weight.kronecker(ones, inputs)))
            blocks += [place.block(place.kronecker(ones, factors.units(len(ones), 1, ones))) for place in bias]
        return block_diagonal(blocks)

"""KFAC and FOOF: one Kronecker product for each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from curvalg import (
    Block,
    Diagonal,
    Expr,
    Facts,
    Kronecker,
    LossFacts,
    MatrixTerm,
    OptionError,
    ProblemError,
    block_diagonal,
)
from curvalg_plugins.kronecker.options import Approximation, Fisher, Rest, Stats, check_draws, check_options

if TYPE_CHECKING:
    from torch import Tensor

    from curvalg import Batch, LayerRecord, Layout


class LayerFactors(MatrixTerm):
    """The base of the approximations: factors of every layer, and the blocks of the other parameters."""

    approximation: Approximation
    joint: bool
    rest: Rest
    uses_layers: ClassVar[bool] = True
    passes: ClassVar[int] = 1
    local: ClassVar[bool] = False  # a weight without its bias has other eigenvectors

    @property
    def columns(self) -> tuple[Fisher, int, int]:
        """The columns of curvature in output space: kind, draws, seed."""
        return "empirical", 1, 0

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return Facts(psd=True)

    def _check(self) -> None:
        check_options(
            self.label,
            fisher=(self.columns[0], ("exact", "mc", "empirical")),
            approximation=(self.approximation, ("expand", "reduce")),
            rest=(self.rest, ("refuse", "diagonal", "exact")),
        )

    def layer_factors(self, batch: Batch) -> Stats:
        """Sums of h hᵀ and δ δᵀ of every layer, and curvature of the other parameters."""
        from curvalg_plugins.kronecker import factors  # needs torch

        active = factors.active_rows(batch)
        layers: dict[tuple[str, ...], Stats] = {}
        # Weights that lie as (inputs, outputs); all others are (outputs, inputs).
        inputs_first: dict[tuple[str, ...], Stats] = {}
        others: Stats = {}
        for records in factors.layers_in_parts(batch, *self.columns):
            for record in records:
                if record.kind == "zero":  # not used in this batch, as an expert without rows
                    continue
                if not factors.factored(record):
                    for name, value in self._others(record).items():
                        others[name] = others[name] + value if name in others else value
                    continue
                found = inputs_first if factors.inputs_first(record) else layers
                h, d = factors.inputs_and_deltas(record)
                outputs = factors.output_factor(d, self.approximation)
                if record.params in found:  # for other columns
                    found[record.params]["outputs"] += outputs
                    continue
                joint = self.joint and record.bias is not None
                a, count = factors.input_factor(h, active, self.approximation, joint, record.real)
                found[record.params] = {"inputs": a, "outputs": outputs, "count": a.new_tensor(count)}
            self._refuse(others)
        return {"layers": layers, "inputs first": inputs_first, "others": others}

    def cost(self, batch: Batch) -> str:
        from curvalg_plugins.kronecker import factors  # needs torch

        return factors.cost(self.label, batch, self.columns[0], self.columns[1], self.passes)

    def _others(self, record: LayerRecord) -> Stats:
        if self.rest == "diagonal":
            return {name: square.reshape(-1) for name, square in record.squares().items()}
        if self.rest == "exact":
            from curvalg_plugins.kronecker import factors  # needs torch

            flat = {name: g.flatten(0, 1).flatten(1) for name, g in record.explicit().items()}
            return {name: factors.gram(g) for name, g in flat.items()}
        return dict.fromkeys(record.params, record.deltas.new_zeros(()))

    def blocks_of_others(self, others: Mapping[str, Tensor]) -> list[Block]:
        """Blocks of the parameters without Kronecker factors."""
        if self.rest == "diagonal":
            return [Block((name,), Diagonal(square)) for name, square in others.items()]
        return [Block((name,), Kronecker(matrix)) for name, matrix in others.items()]

    def _refuse(self, others: Mapping[str, Tensor]) -> None:
        """Raise ProblemError if there are parameters without Kronecker factors, and no rule was chosen for them."""
        if others and self.rest == "refuse":
            raise ProblemError(
                f"{self.label} has no Kronecker factors for {', '.join(others)}; pass rest='diagonal' or rest='exact' for "
                "them, or choose the parameters of linear layers and plain (ungrouped, not transposed) convolutions with "
                "Problem(params=...)"
            )

    def layer_blocks(self, params: tuple[str, ...], output: Tensor, inputs: Tensor) -> list[Block]:
        """The blocks B ⊗ A of a weight and B of its bias, together or apart."""
        weight, *bias = params
        if self.joint or not bias:
            return [Block(params, Kronecker(output, inputs), joint=bool(bias))]
        return [Block((weight,), Kronecker(output, inputs)), Block((bias[0],), Kronecker(output))]

    def assembled(self, stats: Stats, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Expr:
        """All blocks together, with (B, A) of each layer changed on the way."""
        blocks = self.blocks_of_others(stats["others"])
        for params, layer in stats["layers"].items():
            blocks += self.layer_blocks(params, *change(*self.means(layer)))
        for params, layer in stats["inputs first"].items():
            output, inputs = change(*self.means(layer))
            weight, *bias = params
            if self.joint or not bias:  # [W; b] by rows is the weight, then the bias
                blocks.append(Block(params, Kronecker(inputs, output)))
            else:
                blocks += [Block((weight,), Kronecker(inputs, output)), Block((bias[0],), Kronecker(output))]
        return block_diagonal(blocks)

    def means(self, layer: Stats) -> tuple[Tensor, Tensor]:
        """The factors B, a sum of shares, and A, a mean."""
        return layer["outputs"], layer["inputs"] / layer["count"].clamp_min(1)


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
        rest: parameters without Kronecker factors (normalisation, transposed and grouped convolutions, embedding tables of more
            than 4096 rows, parameters used in two ways): "refuse" names them in an error, "diagonal" gives each its exact
            diagonal, "exact" its exact block.
        samples: draws per sample, for "mc" alone.
        seed: of the draws, for "mc" alone.
        factored_damping: c > 0 damps the factors, (B + √c/π I) ⊗ (A + π √c I), which only approximates + c * Identity (Martens
            and Grosse, §6.3).

    Raises:
        ExpressionError: an unknown option.
        ProblemError: parameters without factors and rest="refuse".

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
    rest: Rest = "refuse"
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
        return self.assembled(stats, self._damped)

    def _damped(self, output: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        if not self.factored_damping:
            return output, inputs
        from curvalg_plugins.kronecker import factors  # needs torch

        return factors.split_damping(output, inputs, self.factored_damping)


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
    rest: Rest = "refuse"
    name: ClassVar[str] = "foof"
    symbol: ClassVar[str] = r"\mathrm{FOOF}"

    def __post_init__(self) -> None:
        self._check()

    def accumulate(self, batch: Batch, prepared: None = None) -> Stats:
        return self.layer_factors(batch)

    def finish(self, stats: Stats, layout: Layout, prepared: None = None) -> Expr:
        return self.assembled(stats, lambda b, a: (b.new_zeros(b.shape).fill_diagonal_(1), a))

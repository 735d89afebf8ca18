"""KFOC: the Kronecker product nearest to each layer's block in Frobenius norm."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from curvalg import CurvalgWarning, Expr, MatrixTerm, OptionError, block_diagonal
from curvalg_plugins.kronecker.layer_factors import Layer, LayerFactors
from curvalg_plugins.kronecker.options import Fisher, Rest, Stats, check_draws

if TYPE_CHECKING:
    from curvalg import Batch, Layout


@dataclass(frozen=True)
class KFOC(LayerFactors):
    r"""Kronecker-factored optimal curvature: for each layer the B ⊗ A that is nearest to its block in Frobenius norm (D × D).

    The block is M = Σ vec(G) vec(G)ᵀ over samples and columns, with G = Σ_t δ hᵀ the gradient of one column. Its best Kronecker
    product is the leading singular pair of M rearranged, found by power iteration without forming either:
    B ← Σ G A Gᵀ / ‖A‖², A ← Σ Gᵀ B G / ‖B‖², from KFAC's A; each half takes a pass over the data. So it is never farther from M
    than :class:`~curvalg_plugins.kronecker.KFAC` ("expand"), and both factors stay positive semi-definite. Van Loan and
    Pitsianis 1993 (the rearrangement); Schnaus, Lee and Triebel, Kronecker-Factored Optimal Curvature, 2021.

    Args:
        fisher: as of :class:`~curvalg_plugins.kronecker.KFAC`, and so all that follow.
        joint: a weight and its bias in one block; otherwise the bias has its exact block.
        rest: parameters without Kronecker factors.
        samples: draws per sample, for "mc" alone.
        seed: of the draws, for "mc" alone.
        iterations: at most so many, of two passes over the data each.
        tol: stop earlier where both factors of each layer, scaled to norm one, move by no more. The distance to M is then
            about the least; a warning says where ``iterations`` were not enough. 0 takes all of them.

    Raises:
        ExpressionError: an unknown option.
        ProblemError: as of :class:`~curvalg_plugins.kronecker.KFAC`.

    >>> import torch
    >>> from curvalg import Problem, block_diagonal, registry
    >>> data = (torch.randn(9, 3), torch.randint(4, (9,)))
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))
    >>> problem = Problem(model, torch.nn.CrossEntropyLoss(), data)
    >>> exact = block_diagonal(registry.build("ggn"), by="module").lower(problem).to_dense()
    >>> error = {n: (registry.build(n).lower(problem).to_dense() - exact).norm() for n in ("kfoc", "kfac")}
    >>> bool(error["kfoc"] < error["kfac"])
    True
    """

    fisher: Fisher = "exact"
    joint: bool = True
    rest: Rest = "small"
    samples: int = 1
    seed: int = 0
    iterations: int = 20
    tol: float = 1e-3
    name: ClassVar[str] = "kfoc"
    symbol: ClassVar[str] = r"K_{\mathrm{F}}"

    approximation = "expand"  # of the factors that iterations start from
    of_layers = MatrixTerm.of_layers  # owners of layers make two passes, and no more

    @property
    def columns(self) -> tuple[Fisher, int, int]:
        return self.fisher, self.samples, self.seed

    def __post_init__(self) -> None:
        self._check()
        check_draws(self.label, *self.columns)
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise OptionError(f"kfoc: iterations is an integer ≥ 1, got {self.iterations!r}")
        if not 0 <= self.tol < 1:
            raise OptionError(f"kfoc: tol is a number ≥ 0 and below 1, got {self.tol!r}")

    def cost(self, batch: Batch) -> str:
        from curvalg_plugins.kronecker import factors  # needs torch

        return factors.cost(self.label, batch, self.fisher, self.samples, 1 + 2 * self.iterations)

    def prepare(self, batch: Batch) -> Stats:
        return self.layer_factors(batch)

    def settle(self, prepared: Any) -> Stats:
        from curvalg_plugins.kronecker import rank_one  # needs torch

        layers = {}
        for layer, stats in prepared["layers"].items():
            outputs, inputs = self.means(stats)
            layers[layer] = {"outputs": rank_one.units(outputs)[0], "inputs": rank_one.units(inputs)[0]}
        return {"layers": layers, "others": prepared["others"], "passes": 0, "moved": 1.0}

    def accumulate(self, batch: Batch, prepared: Any = None) -> Stats:
        from curvalg_plugins.kronecker import factors, rank_one  # needs torch

        side, other = _sides(prepared)
        found: dict[Layer, Stats] = {}
        for records in factors.layers_in_parts(batch, *self.columns):
            for layer, pair in self._sorted(records)[0]:
                given = prepared["layers"][layer]
                new = {"factor": rank_one.moments(pair, side, given[other], given["inputs"].shape[-1])}
                if layer.bias is not None and not self.joint:
                    new["bias"] = factors.output_factors(pair.deltas, "reduce")
                before = found.get(layer)
                found[layer] = new if before is None else {key: before[key] + new[key] for key in new}
        return {"layers": found}

    def repeat(self, stats: Any, prepared: Any) -> Stats | None:
        from curvalg_plugins.kronecker import rank_one  # needs torch

        side, other = _sides(prepared)
        layers, moved = {}, 0.0
        for layer, given in prepared["layers"].items():
            new, norms = rank_one.units(stats["layers"][layer]["factor"])
            changes = (new - given[side]).flatten(1).norm(dim=1)[norms > 0]
            moved = max(moved, *changes.tolist(), 0.0)
            layers[layer] = {side: new, other: given[other]}
        passes = prepared["passes"] + 1
        converged = passes > 1 and max(moved, prepared["moved"]) <= self.tol
        if converged or passes == 2 * self.iterations:
            if not converged and self.tol:
                warnings.warn(
                    f"kfoc: after {self.iterations} iterations factors still move by {max(moved, prepared['moved']):.1e} a "
                    f"pass, more than tol={self.tol:g}: they are no worse than kfac's, but not the nearest yet; pass more "
                    "iterations",
                    CurvalgWarning,
                    stacklevel=2,
                )
            return None
        return {"layers": layers, "others": prepared["others"], "passes": passes, "moved": moved}

    def finish(self, stats: Any, layout: Layout, prepared: Any = None) -> Expr:
        from curvalg_plugins.kronecker import factors  # needs torch

        side, other = _sides(prepared)
        blocks = self.blocks_of_others(prepared["others"], layout)
        for parts, (weight, *bias), missing in self.weights(prepared["layers"], prepared["others"], layout):
            pair = {
                side: factors.extended([stats["layers"][part]["factor"] for part in parts], missing),
                other: factors.extended([prepared["layers"][part][other] for part in parts], missing),
            }
            blocks.append(weight.block(weight.kronecker(pair["outputs"], pair["inputs"])))
            for place in bias:
                output = factors.extended([stats["layers"][part]["bias"] for part in parts], missing)
                blocks.append(place.block(place.kronecker(output, factors.units(len(output), 1, output))))
        return block_diagonal(blocks)


def _sides(prepared: Any) -> Any:
    """The side whose factors a pass finds, and that whose factors are given: outputs first, then in turns."""
    return ("outputs", "inputs") if prepared["passes"] % 2 == 0 else ("inputs", "outputs")

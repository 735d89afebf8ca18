"""The base of the approximations: Kronecker factors of every layer, and blocks for the other parameters."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from curvalg import Block, CurvalgWarning, Diagonal, Expr, Facts, Kronecker, LossFacts, MatrixTerm, ProblemError
from curvalg_plugins.kronecker.options import SMALL, Approximation, Fisher, Rest, Stats, check_options

if TYPE_CHECKING:
    from torch import Tensor

    from curvalg import Batch, LayerRecord, Layout


@dataclass(frozen=True)
class Layer:
    """A weight with Kronecker factors, or a part of one, as the key of its statistics.

    Args:
        weight: its name.
        bias: name of the bias that goes with it, or None.
        arrangement: where its matrices lie in the two; equal for equal ones.
    """

    weight: str
    bias: str | None
    arrangement: Any

    def __lt__(self, other: Layer) -> bool:  # trees of statistics are added in sorted order
        return self._key < other._key

    @property
    def _key(self) -> tuple[str, str, str]:
        return self.weight, self.bias or "", self.arrangement.label

    @property
    def params(self) -> tuple[str, ...]:
        """The names of the weight and, if there is one, the bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Place:
    """Where the Kronecker products of a layer lie in a block of its parameters.

    Args:
        params: of the block, in its order.
        joint: the block is laid out as the rows of [W | b].
        inputs_first: the weight lies as (inputs, outputs).
        order: of its numbers otherwise, (size,), or None.
    """

    params: tuple[str, ...]
    joint: bool
    inputs_first: bool
    order: Tensor | None

    @staticmethod
    def of(parts: Sequence[Layer], params: tuple[str, ...], layout: Layout, device: Any) -> Place:
        """The place of some parameters of a layer, of which there may be several parts."""
        first, *others = (part.arrangement for part in parts)
        names = tuple(name for name in layout.names if name in params)
        if not others and first.inputs_first and names == params and parts[0].weight in params:
            return Place(names, False, True, None)
        orders = [lying.order(names, device) for lying in (first, *others)]
        if not others and orders[0] is None:
            return Place(params, len(params) > 1, False, None)
        from curvalg_plugins.kronecker import factors  # needs torch

        return Place(names, False, False, factors.completed(orders, sum(layout.shapes[name].numel() for name in names)))

    def kronecker(self, output: Tensor, inputs: Tensor) -> Kronecker:
        """The products B ⊗ A of stacks of factors (groups, n, n)."""
        if len(output) == 1:
            output, inputs = output[0], inputs[0]
        return Kronecker(inputs, output) if self.inputs_first else Kronecker(output, inputs, order=self.order)

    def values(self, moments: Tensor) -> Tensor:
        """Values (groups, out, in) in the order of the eigenvectors that :meth:`kronecker` makes of bases."""
        flat = (moments.mT if self.inputs_first else moments).reshape(-1)
        return flat if self.order is None else flat.new_empty(len(flat)).index_put_((self.order,), flat)

    def block(self, matrix: Expr) -> Block:
        """The block of a matrix."""
        return Block(self.params, matrix, joint=self.joint)


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
            rest=(self.rest, ("small", "refuse", "diagonal", "exact")),
        )

    # -- statistics ---------------------------------------------------------------------------------------------------------

    def layer_factors(self, batch: Batch) -> Stats:
        """Sums of h hᵀ and δ δᵀ of every layer, and curvature of the other parameters."""
        from curvalg_plugins.kronecker import factors  # needs torch

        active = factors.active_rows(batch)
        layers: dict[Layer, Stats] = {}
        others: dict[tuple[str, ...], Tensor] = {}
        for records in factors.layers_in_parts(batch, *self.columns):
            pairs, rest = self._sorted(records)
            for layer, pair in pairs:
                outputs = factors.output_factors(pair.deltas, self.approximation)
                if layer in layers:  # for other columns
                    layers[layer]["outputs"] += outputs
                    continue
                inputs, count = factors.input_factors(pair, active, self.approximation, self.joint)
                layers[layer] = {"inputs": inputs, "outputs": outputs, "count": count}
            for record in rest:
                for params, values in self._blocks(record):
                    others[params] = others[params] + values if params in others else values
        return {"layers": layers, "others": others}

    def of_layers(self, stats: Stats, names: Set[str]) -> Stats:
        return {
            kind: {key: value for key, value in found.items() if names >= set(getattr(key, "params", key))}
            for kind, found in stats.items()
        }

    def rehearse(self, batch: Batch) -> None:
        self._sorted(list(batch.layers(batch.loss_gradient[None])))

    def cost(self, batch: Batch) -> str:
        from curvalg_plugins.kronecker import factors  # needs torch

        return factors.cost(self.label, batch, self.columns[0], self.columns[1], self.passes)

    def _sorted(self, records: list[LayerRecord]) -> tuple[list[tuple[Layer, Any]], list[LayerRecord]]:
        """Layers with Kronecker factors and the inputs and deltas that these are made of; and the records of the others.

        Raises:
            ProblemError: parameters without factors for which ``rest`` has no rule.
        """
        pairs, others = [], []
        refused: dict[str, tuple[tuple[int, ...], str]] = {}
        for record in records:
            if record.kind == "zero":  # not used in this batch, as an expert without rows
                continue
            found = record.factor_pairs()
            if not isinstance(found, str):
                pairs += [(Layer(pair.weight, pair.bias, pair.arrangement), pair) for pair in found]
                continue
            others.append(record)
            sizes = {name: shape.numel() for name in record.params for shape in [record.shapes[name]]}
            if self.rest == "refuse" or (self.rest == "small" and max(sizes.values()) > SMALL):
                refused |= {name: (tuple(record.shapes[name]), found) for name in record.params}
        if refused:
            named = "; ".join(f"{name} {shape}, because {reason}" for name, (shape, reason) in refused.items())
            raise ProblemError(
                f"{self.label} has no Kronecker factors for {named}. Pass rest='diagonal' for their exact diagonals or "
                "rest='exact' for their exact blocks (size² numbers each), or choose the others with Problem(params=...)"
            )
        return pairs, others

    def _blocks(self, record: LayerRecord) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """The exact curvature of parameters without factors: a block, or its diagonal."""
        from curvalg_plugins.kronecker import factors  # needs torch

        if self.rest == "diagonal":
            for name, square in record.squares().items():
                yield (name,), square.reshape(-1)
            return
        rows = record.columns * record.rows
        flat = {name: g.reshape(rows, record.shapes[name].numel()) for name, g in record.explicit().items()}
        for group in [record.params] if self.joint else [(name,) for name in record.params]:
            yield group, factors.gram(factors.side_by_side([flat[name] for name in group]))

    # -- the matrix ---------------------------------------------------------------------------------------------------------

    def blocks_of_others(self, others: Mapping[tuple[str, ...], Tensor], layout: Layout) -> list[Block]:
        """Blocks of the parameters without Kronecker factors."""
        if self.rest != "diagonal":
            return [Block(params, Kronecker(matrix)) for params, matrix in others.items()]
        share = sum(len(square) for square in others.values()) / layout.size
        if share > 0.5:
            warnings.warn(
                f"{self.label}: {share:.0%} of the parameters have no Kronecker factors and get a diagonal, as rest='diagonal' "
                f"asks: {', '.join(name for params in others for name in params)}",
                CurvalgWarning,
                stacklevel=2,
            )
        return [Block(params, Diagonal(square)) for params, square in others.items()]

    def weights(
        self, layers: Mapping[Layer, Stats], others: Mapping[tuple[str, ...], Tensor], layout: Layout
    ) -> Iterator[tuple[list[Layer], list[Place], int]]:
        """The parts of each weight, its place (with its bias, or one for each), and how many parts no batch has used."""
        parts: dict[tuple[str, ...], list[Layer]] = {}
        for layer in sorted(layers):
            parts.setdefault(layer.params, []).append(layer)
        self._require_one_way([*parts, *others])
        for params, every in parts.items():
            self._require_same_parts(every, layers, layout)
            outputs = layers[every[0]]["outputs"]
            groups = [params] if self.joint else [(name,) for name in params]
            places = [Place.of(every, group, layout, outputs.device) for group in groups]
            known = sum(len(layers[layer]["outputs"]) for layer in every)
            size = outputs.shape[-1] * (layers[every[0]]["inputs"].shape[-1])
            whole = sum(layout.shapes[name].numel() for name in places[0].params)
            yield every, places, whole // size - known

    def _require_one_way(self, groups: Sequence[tuple[str, ...]]) -> None:
        """Raise ProblemError for a parameter that has its block beside one parameter here, and otherwise there."""
        count = Counter(name for group in groups for name in group)
        if several := [name for name, times in count.items() if times > 1]:
            raise self._changing(several)

    def _require_same_parts(self, every: Sequence[Layer], layers: Mapping[Layer, Stats], layout: Layout) -> None:
        """Raise ProblemError for a weight whose matrices lie otherwise in one batch than in another."""
        from curvalg_plugins.kronecker import factors  # needs torch

        shapes = {(layers[k]["outputs"].shape[1:], layers[k]["inputs"].shape[1:]) for k in every}
        weight = every[0].weight
        orders = [layer.arrangement.order((weight,), "cpu") for layer in every]
        if len(shapes) > 1 or not (len(every) == 1 or factors.apart(orders, layout.shapes[weight].numel())):
            raise self._changing(every[0].params)

    def _changing(self, names: Sequence[str]) -> ProblemError:
        return ProblemError(
            f"{self.label} has no Kronecker factors for {', '.join(names)}: used in one way in some batches and in another in "
            "others (transposed, another part, with and without a bias). Choose the other parameters with Problem(params=...)"
        )

    @staticmethod
    def means(layer: Stats) -> tuple[Tensor, Tensor]:
        """The factors B (groups, out, out), a sum of shares, and A (groups, in, in), a mean."""
        return layer["outputs"], layer["inputs"] / layer["count"].clamp_min(1)[:, None, None]

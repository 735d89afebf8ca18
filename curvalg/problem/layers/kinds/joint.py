"""Records that are put together from others, and records of parameters without any gradient."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from curvalg.errors import ProblemError
from curvalg.problem.batch import lazy
from curvalg.problem.layers.kinds.arrangement import Lying
from curvalg.problem.layers.kinds.embedding import TABLE_LIMIT
from curvalg.problem.layers.kinds.scaling import Shift, table_pairs
from curvalg.problem.layers.origin import Origin, PathStep
from curvalg.problem.model.layer_record import FactorPairs, LayerRecord, ParameterGroup


class Joint(LayerRecord):
    """Parameters whose gradients are put together from several records: gₖₙ is the sum of what each gives its entries.

    A record may be of parameters as they are, or of what came from them: rows of a packed projection, a transpose, a table that
    is an embedding and a head.

    Args:
        place: of all the parameters.
        parts: the records.
        origins: what a record calls its parameters -> how these came from parameters of the place; those missing are such
            parameters themselves.
    """

    kind = "joint"

    def __init__(
        self, place: ParameterGroup, parts: Sequence[LayerRecord], origins: Mapping[str, Origin] | None = None
    ) -> None:
        super().__init__(place, parts[0].columns, parts[0].rows)
        self._parts = list(parts)
        self._origins = dict(origins or {})

    def factor_pairs(self) -> list[FactorPairs] | str:
        found: list[FactorPairs] = []
        if (positions := self._positions()) is not None:
            return [positions]
        if len(self._parts) == 1 and any("slice(" in step.label for step in self._steps):
            return "a part of it is used, which may be another one in another batch"
        for part in self._parts:
            pairs = part.factor_pairs()
            if isinstance(pairs, str):
                return pairs
            found += map(self._placed, pairs)
        if not self._disjoint:
            return f"it is used in several ways at once ({', '.join(sorted(part.kind for part in self._parts))})"
        if len({pair.weight for pair in found}) > 1 or len({pair.bias for pair in found}) > 1:
            return "some parts of it have a bias, and others another one or none"
        if len(sizes := {(pair.deltas.shape[-1], pair.inputs.shape[-1]) for pair in found}) > 1:
            return f"its parts are matrices of different sizes, {', '.join(f'{out} x {n}' for out, n in sorted(sizes))}"
        if any(self.shapes[pair.weight].numel() % (out * n) for pair in found for out, n in sizes):
            return "only some of its numbers are used"
        return found

    @property
    def _steps(self) -> list[PathStep]:
        return [step for part in self._parts for own in part.params for step in self._origin(own).steps]

    def _positions(self) -> FactorPairs | None:
        """The pairs of some rows of a table of positions, as of the whole table: other batches may be longer."""
        if len(self._parts) > 1 or not isinstance(shift := self._parts[0], Shift) or shift.kind != "shift":
            return None
        (own,) = shift.params
        origin = self._origin(own)
        shape = self.shapes[origin.name]
        long = [length for length in shape if length > 1]
        if len(long) != 2 or long[0] > TABLE_LIMIT or shift.shapes[own].numel() % long[1]:
            return None
        size, width = long
        entries = origin.entries(shape, shift.deltas.device).reshape(-1, width)
        rows = entries[:, 0] // width
        if not torch.equal(entries, rows[:, None] * width + torch.arange(width, device=entries.device)):
            return None
        d = shift.deltas.sum(2).reshape(self.columns, self.rows, -1, width)
        return table_pairs(origin.name, shape, d, F.one_hot(rows, size).to(d.dtype))

    def _placed(self, pair: FactorPairs) -> FactorPairs:
        """The pair of a record, of the parameters of the place."""
        lying = pair.arrangement
        assert isinstance(lying, Lying)
        weight = self._origin(lying.weight.name).followed_by(lying.weight)
        bias = None if lying.bias is None else self._origin(lying.bias.name).followed_by(lying.bias)
        shapes = tuple((origin.name, self.shapes[origin.name]) for origin in (weight, bias) if origin is not None)
        placed = Lying(shapes, lying.form, weight, bias)
        return replace(pair, weight=weight.name, bias=None if bias is None else bias.name, arrangement=placed)

    def _origin(self, own: str) -> Origin:
        return self._origins.get(own, Origin(own))

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    @property
    def inputs(self) -> Tensor | None:
        return None

    @property
    def deltas(self) -> Tensor:
        """The flattened gradients of all parameters, (K, n, 1, size)."""
        gradients = self.explicit()
        return torch.cat([g.reshape(self.columns, self.rows, 1, -1) for g in gradients.values()], 3)

    def select(self, names: Collection[str]) -> LayerRecord | None:
        place = self.place.of(names)
        chosen = [{own for own in part.params if self._origin(own).name in names} for part in self._parts]
        found = [(part.select(own), own) for part, own in zip(self._parts, chosen, strict=True) if own]
        parts = [part for part, _ in found if part is not None]
        if len(parts) == 1 and not any(self._origin(own).steps for own in parts[0].params):
            return parts[0]
        return Joint(place, parts, self._origins) if parts else None

    def project(self, directions: Mapping[str, Tensor]) -> Tensor:
        first, *others = (part.project(own) for part, own in self._pushed(directions))
        return sum(others, first)

    def project_positions(self, directions: Mapping[str, Tensor]) -> Tensor:
        first, *others = (part.project_positions(own) for part, own in self._pushed(directions))
        if any(part.shape != first.shape for part in others):
            numbers = ", ".join(str(part.shape[-1]) for part in (first, *others))
            raise ProblemError(
                f"{', '.join(self.params)}: used in several ways, at {numbers} positions; choose other parameters with "
                "Problem(params=...)"
            )
        return sum(others, first)

    def _pushed(self, directions: Mapping[str, Tensor]) -> Iterator[tuple[LayerRecord, dict[str, Tensor]]]:
        """The records, each with the directions of its own parameters."""
        for part in self._parts:
            own = {name: self._origin(name) for name in part.params if self._origin(name).name in directions}
            # A record without a direction of its own still has to know how many there are.
            pushed = {name: origin.push(directions[origin.name]) for name, origin in own.items()}
            yield part, pushed or dict(directions)

    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        return self._gathered([part.combine(weights) for part in self._parts])

    def squares(self) -> dict[str, Tensor]:
        if not self._disjoint:
            return {name: g.square().sum((0, 1)) for name, g in self.explicit().items()}
        parts = [{name: t[None] for name, t in part.squares().items()} for part in self._parts]
        return {name: t[0] for name, t in self._gathered(parts).items()}

    def square_norms(self) -> Tensor:
        if not self._disjoint:
            return torch.stack([g.square().flatten(2).sum(2) for g in self.explicit().values()]).sum(0)
        return torch.stack([part.square_norms() for part in self._parts]).sum(0)

    def explicit(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        flat = [{name: g.flatten(0, 1) for name, g in part.explicit(rows).items()} for part in self._parts]
        return {
            name: g.unflatten(0, (self.columns, len(range(self.rows)[rows])))
            for name, g in self._gathered(flat).items()
        }

    def _gathered(self, found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """What the records give for their parameters (P, *shape), added up in the parameters of the place."""
        totals: dict[str, Tensor] = {}
        for part in found:
            for own, value in part.items():
                origin = self._origin(own)
                given = origin.pull(value, self.place.shapes[origin.name])
                totals[origin.name] = totals[origin.name] + given if origin.name in totals else given
        return {name: totals[name] for name in self.params}

    @lazy
    def _counts(self) -> dict[str, Tensor]:
        """How many numbers of the records each number of a parameter is."""
        like = self._parts[0].deltas
        return self._gathered(
            [{own: like.new_ones(1, *part.shapes[own]) for own in part.params} for part in self._parts]
        )

    @property
    def _disjoint(self) -> bool:
        """Whether no number of a parameter has a gradient from two records, or twice from one."""
        return all(bool((count <= 1).all()) for count in self._counts.values())

    def _gram(self, other: LayerRecord) -> Tensor:
        assert isinstance(other, Joint)
        ways = [[[self._origin(own) for own in part.params] for part in joint._parts] for joint in (self, other)]
        if ways[0] != ways[1] or not (self._disjoint and other._disjoint):
            return self._gram_explicit(other)  # the other may be cut into other parts
        return torch.stack([a.gram(b) for a, b in zip(self._parts, other._parts, strict=True)]).sum(0)


class Zero(LayerRecord):
    """Parameters that the output does not depend on.

    Args:
        place: of the parameters.
        columns: K.
        rows: n.
        like: of the dtype and device.
    """

    kind = "zero"

    def __init__(self, place: ParameterGroup, columns: int, rows: int, like: Tensor) -> None:
        super().__init__(place, columns, rows)
        self._like = like.new_zeros(())

    @property
    def nbytes(self) -> int:
        return 0

    @property
    def inputs(self) -> Tensor | None:
        return None

    @property
    def deltas(self) -> Tensor:
        """No position has a delta: (K, n, 0, size)."""
        size = sum(self.place.shapes[name].numel() for name in self.params)
        return self._like.new_zeros(self.columns, self.rows, 0, size)

    def select(self, names: Collection[str]) -> LayerRecord | None:
        place = self.place.of(names)
        return Zero(place, self.columns, self.rows, self._like) if place.params else None

    def project(self, directions: Mapping[str, Tensor]) -> Tensor:
        count, _ = self._directions(directions)
        return self._like.new_zeros(count, self.columns, self.rows)

    def project_positions(self, directions: Mapping[str, Tensor]) -> Tensor:
        return self.project(directions)[..., None]

    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        return {name: self._like.new_zeros(weights.shape[0], *self.place.shapes[name]) for name in self.params}

    def squares(self) -> dict[str, Tensor]:
        return {name: self._like.new_zeros(self.place.shapes[name]) for name in self.params}

    def square_norms(self) -> Tensor:
        return self._like.new_zeros(self.columns, self.rows)

    def explicit(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        count = len(range(self.rows)[rows])
        return {name: self._like.new_zeros(self.columns, count, *self.place.shapes[name]) for name in self.params}

    def gram(self, other: LayerRecord) -> Tensor:
        return self._like.new_zeros(self.columns, self.rows, other.columns, other.rows)

    def _gram(self, other: LayerRecord) -> Tensor:
        return self.gram(other)

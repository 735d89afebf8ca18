"""Records that are put together from others, and records of parameters without any gradient."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from curvalg.problem.model.layer_record import LayerRecord, ParameterGroup


class Joint(LayerRecord):
    """Parameters that share a record on other batches, but not on this one.

    Args:
        place: of all the parameters.
        parts: records that cover each of them once.
    """

    kind = "joint"

    def __init__(self, place: ParameterGroup, parts: Sequence[LayerRecord]) -> None:
        super().__init__(place, parts[0].columns, parts[0].rows)
        self._parts = list(parts)

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
        parts = [part for whole in self._parts if (part := whole.select(names)) is not None]
        if len(parts) < 2:
            return parts[0] if parts else None
        return Joint(self.place.of(names), parts)

    def project(self, directions: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([part.project(directions) for part in self._parts]).sum(0)

    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        return self._merged([part.combine(weights) for part in self._parts])

    def squares(self) -> dict[str, Tensor]:
        return self._merged([part.squares() for part in self._parts])

    def square_norms(self) -> Tensor:
        return torch.stack([part.square_norms() for part in self._parts]).sum(0)

    def explicit(self) -> dict[str, Tensor]:
        return self._merged([part.explicit() for part in self._parts])

    def _merged(self, found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        every = {name: value for part in found for name, value in part.items()}
        return {name: every[name] for name in self.params}

    def _gram(self, other: LayerRecord) -> Tensor:
        return self._gram_explicit(other)  # the other may be cut into other parts


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

    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        return {name: self._like.new_zeros(weights.shape[0], *self.place.shapes[name]) for name in self.params}

    def squares(self) -> dict[str, Tensor]:
        return {name: self._like.new_zeros(self.place.shapes[name]) for name in self.params}

    def square_norms(self) -> Tensor:
        return self._like.new_zeros(self.columns, self.rows)

    def explicit(self) -> dict[str, Tensor]:
        return {name: self._like.new_zeros(self.columns, self.rows, *self.place.shapes[name]) for name in self.params}

    def gram(self, other: LayerRecord) -> Tensor:
        return self._like.new_zeros(self.columns, self.rows, other.columns, other.rows)

    def _gram(self, other: LayerRecord) -> Tensor:
        return self.gram(other)

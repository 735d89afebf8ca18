"""Where the matrices of a layer lie in its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvalg.problem.layers.kinds.maps import WeightForm
from curvalg.problem.layers.origin import Origin


@dataclass(frozen=True)
class Lying:
    """The matrices of a weight, or of a part of one.

    Args:
        shapes: of the weight and, if there is one, its bias, by name.
        form: of what the matrices are read from.
        weight: how that came from the weight.
        bias: how its bias came from the bias; None: it has none.
    """

    shapes: tuple[tuple[str, torch.Size], ...]
    form: WeightForm
    weight: Origin
    bias: Origin | None = None

    @property
    def label(self) -> str:
        """A text that is equal for equal ones."""
        return repr(self)

    @property
    def whole(self) -> bool:
        """Whether the matrices are the weight and the bias as they are."""
        return not self.weight.steps and (self.bias is None or not self.bias.steps)

    @property
    def inputs_first(self) -> bool:
        """Whether the weight is one matrix that lies inputs first, with its bias below."""
        return self.whole and self.form.transposed and self.form.groups == 1 and len(self.form.shape) == 2

    def order(self, names: Sequence[str], device: torch.device) -> Tensor | None:
        """Numbers, in the flattened parameters one after the other, in the order of products (group, output, input)."""
        shapes = dict(self.shapes)
        if self.whole and (self.weight.name not in names or not self.form.transposed):
            return None
        starts = {name: sum(shapes[other].numel() for other in names[:i]) for i, name in enumerate(names)}
        columns = []
        if self.weight.name in starts:
            entries = self.weight.entries(shapes[self.weight.name], device) + starts[self.weight.name]
            columns.append(self.form.matrices(entries[None])[0])
        if self.bias is not None and self.bias.name in starts:
            last = self.bias.entries(shapes[self.bias.name], device) + starts[self.bias.name]
            columns.append(last.reshape(self.form.groups, -1, 1))
        return torch.cat(columns, 2).reshape(-1)

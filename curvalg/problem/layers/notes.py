"""Notes on the layers of a model, found out once for all batches."""

from __future__ import annotations

from collections import Counter


class LayerNotes:
    """Notes on the layers of one problem.

    Attributes:
        reasons: parameter -> why its gradients are multiplied out.
        batched: whether columns go into one backward pass; None before it was measured.
        groups: parameters that share a record.
        spread: tables whose picked rows are the same for all rows of the batch.
        folded: whether rows of the output that lie together are computed together, as many as there are for each row of the
            input; None: it was not asked.
        noise: the rounding of the model's gradients, relative; None before it was measured.
        operations: names of the operations of the batches that were compared.
        compared: parameter -> rows of the batch that its record was compared on, 2 for any more.
        tried: (parameter, such rows) -> how often it was compared by several processes together, whatever came of it.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self.batched: bool | None = None
        self.groups: list[tuple[str, ...]] = []
        self.spread: set[str] = set()
        self.folded: bool | None = None
        self.noise: float | None = None
        self.operations: frozenset[str] = frozenset()
        self.compared: dict[str, int] = {}
        self.tried: Counter[tuple[str, int]] = Counter()

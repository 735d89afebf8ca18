"""The data of a problem: any re-iterable of batches, read the same way in every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from curvalg.errors import ProblemError, ProblemTypeError
from curvalg.problem.data.randomness import LoaderStream, own_generators
from curvalg.problem.data.row_hashes import Fingerprint, fingerprint, same_order, same_rows, total
from curvalg.tensors import trees

TARGET_KEYS = ("target", "targets", "label", "labels", "y")
"""Keys that name the target in a batch that is a mapping."""


class OrderError(ProblemError):
    """The samples came in another order than in the pass before."""


@dataclass(frozen=True)
class ReadBatch:
    """One batch as read: what the model gets, what the loss gets, and where it stands in the data set.

    Args:
        batch: the whole batch, where the model expects its inputs.
        target: the target on the problem's device, or None.
        rows: number of samples.
        start: running number of its first sample.
        index: running number of the batch.
        weightless: whether it counts for nothing: the model is called on it because other processes call it at the same time.
    """

    batch: Any
    target: Any
    rows: int
    start: int
    index: int
    weightless: bool = False

    def after(self, rows: int, batches: int) -> ReadBatch:
        """The same batch, numbered behind so many samples and batches of other processes."""
        return replace(self, start=self.start + rows, index=self.index + batches) if batches else self

    def head(self, rows: int) -> ReadBatch:
        """The first rows of every tensor whose leading axis has the length of the batch, or the first graphs."""

        def cut(tree: Any) -> Any:
            if (graphs := trees.graphs_of(tree)) is not None:
                return trees.batch_of_graphs(tree, graphs[:rows])
            return trees.tensor_map(lambda t: t[:rows] if t.ndim and t.shape[0] == self.rows else t, tree)

        return ReadBatch(cut(self.batch), cut(self.target), rows, self.start, self.index)


class Data:
    """The batches of a data set, read the same way in every pass.

    Args:
        data: a tuple ``(X, y)`` (one batch), a list of batches, a DataLoader or any other re-iterable of batches.
        target: ``target(batch)`` for batches whose form does not show which part is the target.
        needs_target: whether a missing target is an error.
        inputs_alone: whether targets are not looked at, as by a loss of the output alone: a one for each row is in their place.

    Raises:
        ProblemError: a one-shot iterator, something that is not iterable, or inputs alone where targets are needed.
    """

    def __init__(
        self, data: Any, target: Callable[[Any], Any] | None, needs_target: bool, *, inputs_alone: bool = False
    ) -> None:
        if isinstance(data, Iterator):
            raise ProblemError(
                f"data is a {type(data).__name__} that can be read only once, but every product reads it again; pass "
                "list(data), a DataLoader, or an object whose __iter__ starts anew"
            )
        one_batch = isinstance(data, (tuple, Mapping, Tensor)) or trees.has_stores(data)
        if not one_batch and (isinstance(data, (str, bytes)) or not hasattr(data, "__iter__")):
            raise ProblemTypeError(
                f"data must be a tuple (X, y), a list of batches or a loader, got {trees.describe(data)}{_cure(data)}"
            )
        self.single = one_batch
        self.source = [data] if one_batch else data
        if target is not None and not callable(target):
            raise ProblemTypeError(
                f"target is a function of a batch, got {target!r}; write target=lambda batch: batch[{target!r}]"
            )
        if inputs_alone and target is not None:
            raise ProblemError(
                "target= picks what the loss compares outputs with, but this loss takes the output alone; leave it out"
            )
        self.target = target
        self.needs_target = needs_target
        self.inputs_alone = inputs_alone
        if needs_target and target is None and isinstance(data, Tensor):
            raise _targetless(data)
        # A list always gives the same objects; anything else may shuffle or augment and is checked in every pass.
        self.fixed = isinstance(self.source, list)
        self.may_be_empty = False
        """Whether there may be no batch here, as on one of several processes."""
        self._stream = LoaderStream()
        self._reference: list[Fingerprint] | None = None

    def like(self, data: Any) -> Data:
        """Other data, read in the same way."""
        return Data(data, self.target, self.needs_target, inputs_alone=self.inputs_alone)

    @property
    def ordered(self) -> bool:
        """Whether the order of the samples is the data set's own."""
        samplers = [getattr(self.source, name, None) for name in ("sampler", "batch_sampler")]
        samplers.append(getattr(samplers[1], "sampler", None))
        data = torch.utils.data
        random = (data.RandomSampler, data.WeightedRandomSampler, data.SubsetRandomSampler)
        return not any(isinstance(sampler, random) for sampler in samplers)

    @property
    def contents(self) -> Fingerprint | None:
        """The contents that a loader gave in the first pass, without the order; None before, and for data in memory."""
        return None if self.fixed or self._reference is None else total(self._reference)[:-1]

    def sums(self) -> Fingerprint | None:
        """The contents, however they are split into batches, without the order; None where there are none."""
        if self.fixed and self.source:
            prints = [
                fingerprint(batch, trees.rows(self._target(batch)) or trees.rows(batch) or 0) for batch in self.source
            ]
            return total(prints)[:-1]
        return self.contents or None

    def forget(self) -> None:
        """Compare later passes no longer with what the first one gave."""
        self._reference = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": LoaderStream()}

    def read(
        self, device: torch.device, entrance: torch.device | None = None, *, order_matters: bool = False
    ) -> Iterator[ReadBatch]:
        """Read the data once, batch by batch.

        Args:
            device: where the tensors are moved to.
            entrance: where the model takes its inputs, if that is another device; targets stay on the first.
            order_matters: whether another order than in the first pass is an error.

        Raises:
            ProblemError: no data, a batch without a target, or data that differ from the first pass.
        """
        start, prints = 0, []
        for index, raw in enumerate(self._raw()):
            batch = trees.place(_without_nested(raw), entrance or device)
            target = trees.place(self._target(batch), device)
            count = trees.rows(target) if target is not None else trees.rows(batch)
            if count is None:
                raise ProblemError(f"cannot find the number of samples in a batch that is a {_countless(batch)}")
            if not self.fixed:
                prints.append(fingerprint(raw, count))
                if order_matters:
                    self._compare_order(prints)
            if count:
                yield ReadBatch(batch, target, count, start, index)
            start += count
        if not start and not self.may_be_empty:
            raise ProblemError(
                _ONCE if self._reference else "the data are empty: there is no batch with a sample in it"
            )
        if self._reference is None:
            self._reference = prints
        if not same_rows(total(prints), total(self._reference)):
            raise ProblemError(
                "the data differ from the first pass over them (random augmentation, a stateful data set, or shuffling "
                "with per-batch padding), so every product would be of another matrix. Turn that off, or pass "
                "list(loader) to fix one pass"
            )

    def _raw(self) -> Iterator[Any]:
        if self.fixed:
            yield from self.source
            return
        generators = own_generators(self.source)
        states = [generator.get_state() for generator in generators]
        try:
            with self._stream.step():
                iterator = iter(self.source)
            while True:
                with self._stream.step():
                    try:
                        batch = next(iterator)
                    except StopIteration:
                        return
                yield batch
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)

    def _compare_order(self, prints: list[Fingerprint]) -> None:
        """Compare the last batch so far with the same batch of the first pass, row by row."""
        last = len(prints) - 1
        if self._reference is None:
            return
        if last >= len(self._reference) or not same_order(prints[last], self._reference[last]):
            raise OrderError(
                "the loader gives the samples in another order than in its first pass, or other samples, and this quantity "
                "depends on the order. Pass shuffle=False, or list(loader) to fix one pass"
            )

    def _target(self, batch: Any) -> Any:
        if self.inputs_alone:
            count = trees.rows(batch)
            return None if count is None else torch.ones(count, device="cpu")
        if self.target is not None:
            return self.target(batch)
        if isinstance(batch, Mapping):
            found = [key for key in TARGET_KEYS if key in batch]
            if len(found) == 1:
                return batch[found[0]]
            hint = f"the keys are {list(batch)}"
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            return batch[1]
        else:
            hint = f"it is a {trees.describe(batch)}"
            if self.fixed and isinstance(batch, Tensor):
                hint += " (a list is read as a list of batches; one batch is a tuple (X, y); without targets pass loss=None)"
            elif (
                self.single
                and isinstance(batch, tuple)
                and batch
                and all(isinstance(part, (tuple, list, Mapping)) for part in batch)
            ):
                hint += " (a tuple is read as one batch; a list of batches is written [...])"
        if not self.needs_target:
            return None
        if _bare(batch) is not batch or (isinstance(batch, Tensor) and not self.fixed):
            raise _targetless(_bare(batch))
        raise ProblemError(
            f"cannot find the target of a batch: {hint}. Batches are pairs (X, y) or mappings with one of the keys "
            f"{list(TARGET_KEYS)}; for others pass forward=lambda model, batch: ... and target=lambda batch: ..."
        )


def _cure(data: Any) -> str:
    """What to pass in place of something that is no data."""
    if isinstance(data, Dataset):
        return "; a data set gives single samples: pass torch.utils.data.DataLoader(dataset, batch_size=256)"
    if callable(data):  # a loss, or a model
        return "; the order is Problem(model, loss, data)"
    return ""


def call_model(model: Callable[..., Any], batch: Any) -> Any:
    """The model on a batch: ``model(X)`` for pairs and ``(X,)``, keywords for mappings, the whole batch otherwise."""
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key not in TARGET_KEYS})
    return model(batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else _bare(batch))


def _bare(batch: Any) -> Any:
    """The tensor X of a batch (X,), as a TensorDataset of inputs alone makes it; any other batch is itself."""
    alone = isinstance(batch, (tuple, list)) and len(batch) == 1 and isinstance(batch[0], Tensor)
    return batch[0] if alone else batch


def _targetless(inputs: Tensor) -> ProblemError:
    """The error about inputs alone with a loss that compares outputs with targets."""
    return ProblemError(
        f"the loss compares outputs with targets, but the data are inputs alone, a {trees.describe(inputs)}: pass (X, y), or "
        "batches of such pairs. What needs no loss (jacobian, ntk) takes loss=None; a function of one argument is a loss of "
        "the output alone; inputs that are their own targets take target=lambda x: x, forward=lambda model, x: model(x). "
        "Where a matrix is the same for all targets (the ggn of MSELoss, or of CrossEntropyLoss without "
        "class weights and ignored targets), any valid ones do: (X, torch.zeros_like(model(X))), (X, torch.zeros(len(X), "
        "dtype=torch.long))"
    )


def _without_nested(batch: Any) -> Any:
    """Raise ProblemError for a batch with a nested tensor, whose rows have no common shape."""
    if any(t.is_nested for t in trees.tensors(batch)):
        raise ProblemError(
            "a batch has a nested tensor (torch.nested), whose rows differ in shape; pad them with "
            "torch.nested.to_padded_tensor(t, 0.0) and have the model or the loss mask the padding"
        )
    return batch


def _countless(batch: Any) -> str:
    """The kind of a batch whose samples cannot be counted, and what to do."""
    if any(isinstance(leaf, np.ndarray) for leaf in trees.leaves(batch)):
        return f"{trees.describe(batch)}: convert NumPy arrays to tensors with torch.from_numpy"
    return f"{trees.describe(batch)}: its tensors need a leading axis over the samples"


_ONCE = (
    "the data can be read only once: there was a first pass over them, but the next one gives no samples, as when __iter__ "
    "returns the same iterator each time. Pass list(data), a DataLoader, or an object whose __iter__ starts anew"
)

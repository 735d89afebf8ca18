"""The contract of a layer's record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from curvalg.errors import StaleError

Kind = Literal["dense", "scale", "embedding", "shift", "explicit", "zero", "joint"]


@dataclass(frozen=True)
class ParameterGroup:
    """The parameters that a record is about, and the module that owns them.

    Args:
        params: names in the problem's layout.
        name: qualified name of the module that owns the first of them.
        module: that module.
        shapes: of the parameters.
        real: which positions (n, T) are inputs; None: all.
    """

    params: tuple[str, ...]
    name: str
    module: nn.Module | None
    shapes: Mapping[str, torch.Size]
    real: Tensor | None = None

    def of(self, names: Collection[str]) -> ParameterGroup:
        """The group of some of its parameters."""
        return replace(self, params=tuple(name for name in self.params if name in names))


class Arrangement(Protocol):
    """Where the rows of Kronecker products lie in the parameters of a layer; equal for equal ones."""

    @property
    def label(self) -> str:
        """A text that is equal for equal ones."""
        ...

    @property
    def inputs_first(self) -> bool:
        """Whether the weight is one matrix that lies inputs first, with its bias below."""
        ...

    def order(self, names: Sequence[str], device: torch.device) -> Tensor | None:
        """Numbers, in the flattened parameters one after the other, in the order of products (group, output, input).

        Args:
            names: of the weight, or of weight and bias in their order in the problem; with a bias it is the last input.
            device: of the numbers.

        Returns:
            None where they lie so, as the rows of [W | b] where there is a bias.
        """
        ...


@dataclass(frozen=True)
class FactorPairs:
    """Inputs and deltas of a weight, or part of one, that is one matrix, or several which each multiply inputs of their own.

    Args:
        weight: its name.
        bias: name of the bias, or None.
        inputs: h (groups, n, T, in).
        deltas: δ (groups, K, n, T, out).
        arrangement: where the matrices lie in the parameters.
        real: which positions (groups, n, T) are inputs; None: all.
    """

    weight: str
    bias: str | None
    inputs: Tensor
    deltas: Tensor
    arrangement: Arrangement
    real: Tensor | None = None


class LayerRecord(ABC):
    """Gradients gₖₙ = ∂⟨sₖₙ, zₙ⟩/∂θ of one layer's parameters, for all columns k and rows n of a batch.

    They are held as layer inputs h and output deltas δ, which is what makes products with them cheap: for a dense layer
    gₖₙ = Σₜ δₖₙₜ hₙₜᵀ for the weight and Σₜ δₖₙₜ for the bias, with t over the positions that share the weight (tokens,
    places of a convolution, repeated uses).

    Attributes:
        kind: "dense" (linear layers and convolutions), "scale" (an elementwise factor, gₖₙ = Σₜ δₖₙₜ ∘ hₙₜ: the affine part of
            normalisation layers), "embedding" (row hₙₜ of the gradient gets δₖₙₜ), "shift" (an added parameter,
            gₖₙ = Σₜ δₖₙₜ), "explicit" (the flattened gradients themselves, as deltas with T = 1), "zero" (the output does
            not depend on the parameters), "joint" (the sum of several of these, as of the parts of a packed weight).
        params: names in ``problem.layout`` that this record covers, such as ("0.weight", "0.bias").
        name: qualified name of the module that owns the first of them, "" for the root.
        module: that module, or None.
        shapes: of the parameters, by name.
        columns: K.
        rows: n.
        weight: name of the parameter that multiplies inputs, of dense layers, scales and embeddings.
        bias: name of the parameter that is added, in a record with a weight.
        transposed: whether a dense weight lies inputs first, as in transposed convolutions and in h W.
        real: which positions (n, T) are inputs of the layer, where some only fill up rows that have fewer than others
            (experts): inputs and deltas are zero there. None: all are.
    """

    kind: ClassVar[Kind]
    weight: str | None = None
    bias: str | None = None
    transposed: bool = False

    def __init__(self, place: ParameterGroup, columns: int, rows: int) -> None:
        self.place = place
        self.params = place.params
        self.name = place.name
        self.module = place.module
        self.shapes = place.shapes
        self.real = place.real
        self.columns = columns
        self.rows = rows
        self._parts_of: dict[str, LayerRecord] = {}

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The memory of the distinct tensors that are held."""

    @property
    def input_bytes(self) -> int:
        """The memory of what does not grow with the columns."""
        inputs = self.inputs
        return 0 if inputs is None else bytes_of(inputs)

    @property
    @abstractmethod
    def inputs(self) -> Tensor | None:
        """Inputs h (n, T, in): patches of a convolution, integers (n, T) of an embedding, normalised inputs of a scale.

        (groups, n, T, in) where a convolution has groups; None where the gradient does not depend on it.
        """

    @property
    @abstractmethod
    def deltas(self) -> Tensor:
        """Output deltas δ of shape (K, n, T, out), or (groups, K, n, T, out) where a convolution has groups."""

    @abstractmethod
    def select(self, names: Collection[str]) -> LayerRecord | None:
        """The record of some of its parameters; None if it has none of them."""

    @abstractmethod
    def project(self, directions: Mapping[str, Tensor]) -> Tensor:
        """Inner products ⟨gₖₙ, vₚ⟩, shape (P, K, n).

        Args:
            directions: name -> (P, *parameter.shape); missing names count as zero, names of other layers are ignored.
        """

    @abstractmethod
    def project_positions(self, directions: Mapping[str, Tensor]) -> Tensor:
        """Shares of the positions t in :meth:`project`, whose sum it is: shape (P, K, n, T); T = 1 where there are none."""

    @abstractmethod
    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        """Sums Σₖₙ wₚₖₙ gₖₙ for weights (P, K, n), by parameter (P, *parameter.shape)."""

    def project_each(self, directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inner products ⟨gₖₙ, vₚ⟩ of each parameter by itself, (P, K, n) by name; their sum is :meth:`project`."""
        return {name: self._alone(name).project(directions) for name in self.params}

    def combine_each(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums as of :meth:`combine`, with weights (P, K, n) of each parameter's own."""
        return {name: self._alone(name).combine(weights[name])[name] for name in self.params}

    def _alone(self, name: str) -> LayerRecord:
        if name not in self._parts_of:  # a part may keep sums over positions
            record = self.select((name,))
            assert record is not None
            self._parts_of[name] = record
        return self._parts_of[name]

    @abstractmethod
    def squares(self) -> dict[str, Tensor]:
        """Sums of squares Σₖₙ gₖₙ² by parameter, of its shape."""

    @abstractmethod
    def square_norms(self) -> Tensor:
        """Squared norms ‖gₖₙ‖² over all parameters of the record, shape (K, n)."""

    @abstractmethod
    def explicit(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        """Gradients gₖₙ of some rows by parameter, (K, n, *parameter.shape): as much memory as K·n gradients.

        Args:
            rows: one after the other, by default all.
        """

    def factor_pairs(self) -> list[FactorPairs] | str:
        """The inputs and deltas whose second moments are Kronecker factors, part by part of a weight, or why there are none."""
        return "each of its numbers multiplies or shifts numbers of its own, so that there is no matrix"

    def gram(self, other: LayerRecord) -> Tensor:
        """Inner products ⟨gₖₙ, g'ₖ'ₙ'⟩ with the gradients of the same parameters on any batch, shape (K, n, K', n').

        Raises:
            ValueError: the other record is of other parameters.
        """
        if set(other.params) != set(self.params):
            raise ValueError(f"expected a record of the parameters {self.params}, got one of {other.params}")
        # A parameter may be used in another way on another batch (a branch that depends on the data).
        return self._gram(other) if type(other) is type(self) else self._gram_explicit(other)

    @abstractmethod
    def _gram(self, other: LayerRecord) -> Tensor:
        """Inner products as of :meth:`gram`, where the other record is of this class."""

    def _gram_explicit(self, other: LayerRecord) -> Tensor:
        left, right = self.explicit(), other.explicit()
        shape = (self.columns, self.rows, other.columns, other.rows)
        parts = [left[p].reshape(shape[0] * shape[1], -1) @ right[p].reshape(shape[2] * shape[3], -1).T for p in left]
        return torch.stack(parts).sum(0).reshape(shape)

    def _directions(self, directions: Mapping[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
        """The number P of directions, and the directions of this record's parameters."""
        count = next((v.shape[0] for v in directions.values()), 0)
        return count, {name: directions[name] for name in self.params if name in directions}

    def __repr__(self) -> str:
        shown = ", ".join(self.params)
        return f"LayerRecord({self.kind} of {shown}; {self.columns} columns, {self.rows} rows)"


class GuardedInput:
    """A layer input that must not change as long as it is used: it may be the user's own data.

    Args:
        tensor: the input.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._version = tensor._version

    def __reduce__(self) -> tuple[type[GuardedInput], tuple[Tensor]]:
        return GuardedInput, (self.tensor,)  # a version is of one process

    @property
    def tensor(self) -> Tensor:
        """The guarded input, unchanged.

        Raises:
            StaleError: it was written into.
        """
        if self._tensor._version != self._version:
            raise StaleError(
                "a layer input that a recording holds was changed in place (the data, or a tensor of the model); call "
                "problem.close() and operator.refresh(), or pass cache=0"
            )
        return self._tensor


def bytes_of(*tensors: Tensor | None) -> int:
    """The memory that tensors take."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


LIMIT = 2**28
"""Bytes that an intermediate result may take."""


def steps(count: int, elements: int, dtype: torch.dtype) -> list[slice]:
    """Slices of ``count`` things of so many elements each, none larger than the limit unless a single one is."""
    width = max(1, min(count, LIMIT // max(1, elements * dtype.itemsize)))
    return [slice(at, min(at + width, count)) for at in range(0, count, width)]

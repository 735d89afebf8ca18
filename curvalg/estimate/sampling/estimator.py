"""The contract of a method by random products: the sketch of products, and the value with its error made of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from curvalg.estimate.sampling.integrands import Integrand
from curvalg.estimate.sampling.probes import Probes
from curvalg.estimate.target import Target
from curvalg.runs.run_state import Form
from curvalg.tensors.spaces import VectorSpace

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Estimator(ABC):
    """A method; a :class:`~curvalg.estimate.sampling.sampler.Sampler` draws its vectors block by block and keeps its sketch.

    Args:
        target: the operator.
        integrand: what is averaged.
        seed: of the random vectors.
        room: test vectors that are expected, to make room for.
    """

    target: Target
    integrand: Integrand
    seed: int
    room: int

    method: ClassVar[str]
    multiplications: ClassVar[int] = 1
    """How many each test vector takes."""
    safety: ClassVar[float] = 1.0
    """The factor on the standard error of the samples, for samples that depend on each other look too much alike.
    Calibrated over five spectra: at least nine of ten errors are below two of the reported ones."""
    keeps: ClassVar[bool] = True
    """Whether test vectors are needed again."""
    axes: ClassVar[Mapping[str, int]] = {}
    """Names of tensors that are vectors, which live on the operator's device -> the axis along which their numbers lie."""

    @abstractmethod
    def form(self, columns: int) -> Form:
        """The sketch of so many test vectors: its tensors, with letters for what their number does not decide."""

    @abstractmethod
    def extended(self, sketch: Tensors, start: int, stop: int) -> tuple[Tensors, int]:
        """The sketch with test vectors start ≤ i < stop, and how many multiplications that took."""

    @abstractmethod
    def estimate(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """Value and standard error, float64."""

    @classmethod
    def columns(cls, multiplications: int, size: int) -> int:
        """The number of test vectors for so many multiplications of an operator with so many columns."""
        return min(multiplications // cls.multiplications, size)

    def known(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        """Orthonormal rows whose products the sketch knows, with these; none by default."""
        return self.no_rows(), self.no_rows()

    def images(self, rows: Tensor) -> Tensor:
        """Products with rows of a basis."""
        return self.multiply(rows)

    @cached_property
    def probes(self) -> Probes:
        """The random test vectors."""
        return Probes(self.target.space, self.seed, self.integrand.distribution, self.keeps)

    def multiply(self, rows: Tensor) -> Tensor:
        """Products with rows, as rows."""
        return self.target.multiply(rows.T).T.contiguous()

    def no_rows(self) -> Tensor:
        """An empty tensor of rows."""
        space = self.target.space
        return torch.zeros(0, self.target.local, dtype=space.dtype, device=space.device)


class UnitVectors(Estimator):
    """The exact value, by an orthonormal basis alone: there is never a sketch to extend."""

    method: ClassVar[str] = "exact"

    def form(self, columns: int) -> Form:
        """An empty sketch."""
        return {}

    def extended(self, sketch: Tensors, start: int, stop: int) -> tuple[Tensors, int]:
        raise NotImplementedError

    def estimate(self, sketch: Tensors, columns: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    @classmethod
    def columns(cls, multiplications: int, size: int) -> int:
        """No test vectors."""
        return 0


def independent(rows: Tensor, images: Tensor, space: VectorSpace) -> tuple[Tensor, Tensor]:
    """Orthonormal combinations of rows, with those of their images; of nearly dependent directions none."""
    values, vectors = torch.linalg.eigh(space.inner(rows, rows))
    clear = values > torch.finfo(rows.dtype).eps ** 0.5 * space.size
    weights = (vectors[:, clear] / values[clear].sqrt()).T.to(rows)
    return weights @ rows, weights @ images

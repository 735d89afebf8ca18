"""The contract of a curvature term: four base classes that built-in terms and plugins share.

A local term is a pair (u, u̇) in output space; its product with v is (∂_v J)ᵀ u + Jᵀ u̇, where J is the Jacobian of the
outputs with respect to the parameters and ż = J v the tangent that u̇ is linear in. One file, one frozen dataclass; its
fields are the options::

    @dataclass(frozen=True)
    class GGN(Term):
        '''Generalised Gauss-Newton matrix.'''

        def cotangent_dot(self, batch, tangent):
            return batch.loss_hvp(tangent)
"""

from __future__ import annotations

import re
from collections.abc import Set
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from curvalg.expr.facts import LossFacts
from curvalg.expr.node import Expr

ActsOn = Literal["positions", "samples", "batch"]

if TYPE_CHECKING:
    from torch import Tensor

    from curvalg.problem import Batch, GradientField, Layout

    Stats = Any
    """A pytree of tensors whose shapes do not depend on the batch; added leaf by leaf over batches."""


class NamedExpr(Expr):
    """A leaf that prints by the name it is registered under."""

    api: ClassVar[int] = 1
    """Version of this contract that the term was written for."""
    name: ClassVar[str]
    """The name it prints by; the class's name in snake case unless set."""
    numbered: ClassVar[bool] = False
    """Whether it depends on the running numbers of samples (Monte-Carlo draws), so that the data must keep their order."""
    symbol: ClassVar[str | None] = None
    """LaTeX of the matrix; None: its name in upright letters."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()

    @property
    def label(self) -> str:
        """The name this instance was built by in the registry, else the class's own."""
        label: str = self.__dict__.get("_label", self.name)
        return label

    def labelled(self, label: str) -> NamedExpr:
        """This instance, printed under the given name; equality and hash ignore that name."""
        object.__setattr__(self, "_label", label)
        return self

    def validate(self, loss: LossFacts | None) -> None:
        """Raise if this matrix is not defined for a loss (None where the problem has none).

        Called when the expression is lowered. The base class needs a loss.

        Raises:
            LossError: the matrix is not defined for this loss.
        """
        from curvalg.errors import LossError

        if loss is None:
            raise LossError(f"{self.label} needs a loss, but the problem was made with loss=None")


def needs_model(expr: Expr) -> bool:
    """Whether something in an expression is computed from a model, a loss or data."""
    return any(isinstance(node, NamedExpr) for node in expr.walk())


class Term(NamedExpr):
    """A curvature matrix computed in one pass over the data, from a pair (u, u̇) in output space.

    Methods see one batch and one column. What the batch hands out carries each sample's share of the whole loss; a
    term never divides by the size of a batch.
    """

    def cotangent(self, batch: Batch) -> Tensor | None:
        """The vector u, of the output's shape and independent of any tangent; None means u ≡ 0."""
        return None

    def cotangent_dot(self, batch: Batch, tangent: Tensor) -> Tensor | None:
        """The vector u̇, of the output's shape and linear in the tangent ż = J v; None means u̇ ≡ 0.

        Runs inside a batched backward pass: no ``.item()``, no ``.numpy()``, no random numbers of its own.
        """
        return None

    acts_on: ClassVar[ActsOn] = "batch"
    """What u and u̇ at a position (an element of the loss, such as a token) come from.

    "positions": the output, target and tangent of that position alone, as of ``batch.loss_hvp``; "samples": those of its
    sample, as of ``batch.dot``; "batch": more than that. Where it is the position alone (also "samples", where a sample is a
    position), outputs of vocabulary size are taken in chunks: the methods then see a batch of some positions, each a row, which
    offers all but ``vjp``, ``per_sample_gradients`` and ``layers``.
    """

    centred: ClassVar[bool] = False
    """Whether the mean of the columns that :meth:`factor` gives is to be taken from each (N of them): V (I − 11ᵀ/N) Vᵀ."""

    def factor(self, batch: Batch) -> Tensor | None:
        """Columns s of shape (columns, *output.shape) with A = Σₙ Σₖ (Jₙᵀ sₖₙ)(Jₙᵀ sₖₙ)ᵀ over the rows n of all batches.

        Optional, for positive semi-definite matrices that are the Gauss-Newton form of few output directions: from it come
        exact inverses through the Gram matrix and products from kept layer inputs. None: there is no such form.

        Raises:
            LossError: there is none for this loss.
        """
        return None

    def factor_columns(self, batch: Batch) -> int:
        """How many columns :meth:`factor` gives; to be overridden where making them only to count is expensive."""
        columns = self.factor(batch)
        return 0 if columns is None else int(columns.shape[0])


class DatasetTerm(Term):
    """A curvature matrix whose product needs statistics of the whole data set."""

    def prepare(self, batch: Batch) -> Stats | None:
        """Statistics without a tangent, added over batches; computed once and kept."""
        return None

    def project(self, vector: Tensor, prepared: Stats | None) -> Stats | None:
        """Totals that are linear in the vector v (D,) and need no pass over the data, such as ∇Lᵀv."""
        return None

    def reduce(self, batch: Batch, tangent: Tensor, prepared: Stats | None) -> Stats | None:
        """Totals that are linear in the tangent, added over batches; costs a second pass per product."""
        return None

    def cotangent_dot(  # type: ignore[override]
        self, batch: Batch, tangent: Tensor, prepared: Stats | None, totals: Stats | None
    ) -> Tensor | None:
        """The vector u̇ from the results of :meth:`prepare` and of :meth:`project` or :meth:`reduce`."""
        return None


class MatrixTerm(NamedExpr):
    """An explicit matrix, accumulated over the data and finished as a structured expression."""

    uses_layers: ClassVar[bool] = False
    """Whether the methods ask for ``batch.layers``, which then records the model's only call instead of making another."""

    local: ClassVar[bool] = True
    """Whether its sub-matrix over some parameters is what it gives where these alone are differentiated.

    Otherwise the whole matrix is made, and the sub-matrix taken from it.
    """

    def prepare(self, batch: Batch) -> Stats | None:
        """Statistics of an optional first pass, added over batches."""
        return None

    def settle(self, prepared: Stats) -> Stats:
        """What the second pass and ``finish`` get in place of the sums of the first: what is computed of these once.

        Such as the eigenvectors of factors, found by :func:`curvalg.distributed.dealt`: all processes that share a problem call
        this together, also those without data.
        """
        return prepared

    def accumulate(self, batch: Batch, prepared: Stats | None = None) -> Stats:
        """Statistics of this batch, added over batches."""
        raise NotImplementedError(f"{type(self).__name__} must define accumulate(batch, prepared)")

    def repeat(self, stats: Stats, prepared: Stats | None) -> Stats | None:
        """What the data are passed over once more with, in place of ``prepared``; None: the sums of this pass suffice.

        For a matrix that is found by iterations, as a power iteration: after each pass it is given the sums of
        :meth:`accumulate`, and what that had for ``prepared``. :meth:`finish` gets those of the last pass. All processes that
        share a problem call this together, with the same sums.
        """
        return None

    def of_layers(self, stats: Stats, names: Set[str]) -> Stats:
        """The statistics of the layers over some parameters: the same structure without all other layers.

        To be defined by a matrix that is block-diagonal over layers and keeps its statistics by layer: where parameters are
        sharded, each process sums and finishes the blocks of its own layers. :meth:`finish` gets the statistics of some layers
        then, and a layout of their parameters alone.

        Args:
            stats: what :meth:`prepare` or :meth:`accumulate` gives.
            names: of parameters, of each module all or none.
        """
        raise NotImplementedError(f"{type(self).__name__} does not keep its statistics by layer (of_layers)")

    def rehearse(self, batch: Batch) -> None:
        """Raise an error for a model that the matrix cannot be made of.

        Called with one row of the data before a pass over all of them, where the matrix ``uses_layers``. Layers are
        compared with gradients only in that pass.
        """

    def cost(self, batch: Batch) -> str | None:
        """What making the matrix costs, as a line for people, and which options cost less; None: nothing out of the ordinary.

        ``explain()`` shows it until the matrix is made. It is given the first batch, without any pass over the data.
        """
        return None

    def finish(self, stats: Stats, layout: Layout, prepared: Stats | None = None) -> Expr:
        """The matrix as an expression of array leaves, from the summed statistics."""
        raise NotImplementedError(f"{type(self).__name__} must define finish(stats, layout, prepared)")


class GradientTerm(NamedExpr):
    """A curvature matrix that multiplies by itself, given the gradient of the loss at any parameters.

    For what needs first derivatives of the model alone, such as differences of gradients. A sub-matrix over some parameters is
    what the term gives where these alone are moved and differentiated.
    """

    def multiply(self, gradients: GradientField, vector: Tensor) -> Tensor:
        """The product with one vector v (D,), of its shape.

        Each ``gradients.at(parameters)`` is one pass over the data. Lengths are ``gradients.norm(v)``, which is that of the
        whole vector where processes hold parts of it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define multiply(gradients, vector)")

    def lines(self, gradients: GradientField) -> list[str]:
        """What ``explain()`` says of the products, a line each, from what is in ``gradients.kept``; no gradient is taken."""
        return []

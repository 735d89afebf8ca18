"""The built-in curvature matrices.

L(θ) = Σₙ cₙ is a sum of shares (class weights, ignored targets and the denominator of the whole data set inside), zₙ
the output of sample n, Jₙ its Jacobian, rₙ = ∂cₙ/∂zₙ, Bₙ = ∂²cₙ/∂zₙ², s = N for a mean loss and 1 for a sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar

from curvalg.errors import LossError, OptionError
from curvalg.expr.facts import Facts, LossFacts
from curvalg.expr.node import Space
from curvalg.expr.term import ActsOn, DatasetTerm, NamedExpr, Term

if TYPE_CHECKING:
    from torch import Tensor

    from curvalg.problem import Batch

SYMMETRIC = Facts(symmetric=True)
PSD = Facts(psd=True)


def _psd_if_convex(loss: LossFacts | None) -> Facts:
    return PSD if loss is not None and loss.convex else SYMMETRIC


@dataclass(frozen=True)
class Hessian(Term):
    """Hessian of the loss, ∇²L(θ) (D × D). Pearlmutter, Neural Computation 1994."""

    symbol: ClassVar[str] = "H"
    acts_on: ClassVar[ActsOn] = "positions"

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return SYMMETRIC

    def cotangent(self, batch: Batch) -> Tensor:
        return batch.loss_gradient

    def cotangent_dot(self, batch: Batch, tangent: Tensor) -> Tensor:
        return batch.loss_hvp(tangent)


@dataclass(frozen=True)
class GGN(Term):
    """Generalised Gauss-Newton matrix, Σₙ Jₙᵀ Bₙ Jₙ (D × D). Schraudolph, Neural Computation 2002."""

    symbol: ClassVar[str] = "G"
    acts_on: ClassVar[ActsOn] = "positions"

    def validate(self, loss: LossFacts | None) -> None:
        super().validate(loss)
        if loss is not None and not loss.of_output:
            raise loss.without_output(self.label)

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return _psd_if_convex(loss)

    def cotangent_dot(self, batch: Batch, tangent: Tensor) -> Tensor:
        return batch.loss_hvp(tangent)

    def factor(self, batch: Batch) -> Tensor:
        return batch.row_factor()

    def factor_columns(self, batch: Batch) -> int:
        return batch.loss_rank


@dataclass(frozen=True)
class Residual(Term):
    """Hessian minus GGN, Σₙ Σᵢ (rₙ)ᵢ ∇²(zₙ)ᵢ (D × D): the curvature of the model itself."""

    symbol: ClassVar[str] = "R"
    acts_on: ClassVar[ActsOn] = "positions"

    def validate(self, loss: LossFacts | None) -> None:
        super().validate(loss)
        if loss is not None and not loss.of_output:
            raise loss.without_output(self.label)

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return SYMMETRIC

    def cotangent(self, batch: Batch) -> Tensor:
        return batch.loss_gradient


def _check_samples(term: NamedExpr, samples: int, seed: int) -> None:
    if isinstance(samples, bool) or not isinstance(samples, Integral) or samples < 1:
        raise OptionError(f"{term.label}: samples must be a positive integer, got {samples!r}")
    if isinstance(seed, bool) or not isinstance(seed, Integral) or seed < 0:
        raise OptionError(f"{term.label}: seed must be an integer ≥ 0, got {seed!r}")


@dataclass(frozen=True)
class MonteCarloGGN(Term):
    """Monte-Carlo GGN, Σₙ Σₘ Jₙᵀ sₙₘ sₙₘᵀ Jₙ with E Σₘ sₙₘ sₙₘᵀ = Bₙ (D × D).

    The draws are fixed by (seed, number of the sample in the data): products repeat, and any split into batches gives
    the same matrix.

    Args:
        samples: draws per sample.
        seed: seed of the draws.
    """

    samples: int = 1
    seed: int = 0
    name: ClassVar[str] = "ggn_mc"
    numbered: ClassVar[bool] = True
    symbol: ClassVar[str] = r"\hat{G}"
    acts_on: ClassVar[ActsOn] = "samples"

    def __post_init__(self) -> None:
        _check_samples(self, self.samples, self.seed)

    def validate(self, loss: LossFacts | None) -> None:
        super().validate(loss)
        if loss is not None and not loss.of_output:
            raise loss.without_output(self.label)

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return PSD

    def cotangent_dot(self, batch: Batch, tangent: Tensor) -> Tensor:
        return batch.outer(batch.pseudo_gradients(self.samples, seed=self.seed), tangent)

    def factor(self, batch: Batch) -> Tensor:
        return batch.per_sample_columns(batch.pseudo_gradients(self.samples, seed=self.seed))


def _require_likelihood(term: NamedExpr, loss: LossFacts | None) -> None:
    if loss is not None and not loss.likelihood:
        raise LossError(
            f"{term.label} is defined for losses that are negative log-likelihoods; {loss.name} declares none. "
            "Use 'ggn', or a loss such as CrossEntropy, MSE, BCEWithLogits, PoissonNLL or GaussianNLL"
        )


@dataclass(frozen=True)
class Fisher(Term):
    """Fisher information Σₙ αₙ Jₙᵀ E[∇ log p ∇ log pᵀ] Jₙ under the model's own likelihood (D × D).

    Equals the GGN for natural parametrisations (softmax, Gaussian mean, …). Martens, JMLR 2020.
    """

    symbol: ClassVar[str] = "F"
    acts_on: ClassVar[ActsOn] = "positions"

    def validate(self, loss: LossFacts | None) -> None:
        super().validate(loss)
        _require_likelihood(self, loss)

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return PSD

    def cotangent_dot(self, batch: Batch, tangent: Tensor) -> Tensor:
        return batch.fisher_hvp(tangent)

    def factor(self, batch: Batch) -> Tensor:
        return batch.row_factor(fisher=True)


@dataclass(frozen=True)
class MonteCarloFisher(Term):
    """Monte-Carlo Fisher information, Σₙ Σₘ Jₙᵀ sₙₘ sₙₘᵀ Jₙ with E Σₘ sₙₘ sₙₘᵀ = αₙ E[∇ log p ∇ log pᵀ] (D × D).

    The draws are fixed as those of :class:`MonteCarloGGN` are.

    Args:
        samples: draws per sample.
        seed: seed of the draws.
    """

    samples: int = 1
    seed: int = 0
    name: ClassVar[str] = "fisher_mc"
    numbered: ClassVar[bool] = True
    symbol: ClassVar[str] = r"\hat{F}"
    acts_on: ClassVar[ActsOn] = "samples"

    def __post_init__(self) -> None:
        _check_samples(self, self.samples, self.seed)

    def validate(self, loss: LossFacts | None) -> None:
        super().validate(loss)
        _require_likelihood(self, loss)

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return PSD

    def cotangent_dot(self, batch: Batch, tangent: Tensor) -> Tensor:
        return batch.outer(batch.pseudo_gradients(self.samples, seed=self.seed, fisher=True), tangent)

    def factor(self, batch: Batch) -> Tensor:
        return batch.per_sample_columns(batch.pseudo_gradients(self.samples, seed=self.seed, fisher=True))


@dataclass(frozen=True)
class Covariance(Term):
    """Uncentred gradient covariance (empirical Fisher), s Σₙ ∇cₙ ∇cₙᵀ (D × D). Kunstner et al., arXiv 1905.12558."""

    symbol: ClassVar[str] = "U"
    acts_on: ClassVar[ActsOn] = "samples"

    def validate(self, loss: LossFacts | None) -> None:
        super().validate(loss)
        if loss is not None and not loss.per_sample:
            raise loss.without_samples(self.label)

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return PSD

    def cotangent_dot(self, batch: Batch, tangent: Tensor) -> Tensor:
        gradient = batch.loss_gradient
        product: Tensor = batch.scale * gradient * batch.dot(gradient, tangent)
        return product

    def factor(self, batch: Batch) -> Tensor:
        return batch.gradient_columns()


@dataclass(frozen=True)
class CenteredCovariance(DatasetTerm):
    """Centred gradient covariance, s Σₙ ∇cₙ ∇cₙᵀ − (s/N) ∇L ∇Lᵀ (D × D)."""

    symbol: ClassVar[str] = "C"
    centred: ClassVar[bool] = True

    def validate(self, loss: LossFacts | None) -> None:
        super().validate(loss)
        if loss is not None and not loss.per_sample:
            raise loss.without_samples(self.label)

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return PSD

    def prepare(self, batch: Batch) -> Tensor:
        return batch.vjp(batch.loss_gradient)

    def project(self, vector: Tensor, prepared: Any) -> Tensor:
        product: Tensor = prepared @ vector
        return product

    def cotangent_dot(self, batch: Batch, tangent: Tensor, prepared: Any, totals: Any) -> Tensor:  # type: ignore[override]
        gradient = batch.loss_gradient
        product: Tensor = batch.scale * gradient * (batch.dot(gradient, tangent) - totals / batch.count)
        return product

    def factor(self, batch: Batch) -> Tensor:
        return batch.gradient_columns()


@dataclass(frozen=True)
class Jacobian(NamedExpr):
    """Jacobian of all outputs with respect to the parameters (M × D), rows in the order of the data."""

    symbol: ClassVar[str] = "J"
    codomain: ClassVar[Space] = "outputs"

    def validate(self, loss: LossFacts | None) -> None:
        """A Jacobian needs no loss."""

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return Facts(symmetric=False)


@dataclass(frozen=True)
class LossHessian(NamedExpr):
    """Hessian of the loss with respect to all outputs, the block-diagonal of the Bₙ (M × M)."""

    symbol: ClassVar[str] = "B"
    domain: ClassVar[Space] = "outputs"
    codomain: ClassVar[Space] = "outputs"

    def validate(self, loss: LossFacts | None) -> None:
        super().validate(loss)
        if loss is not None and not loss.of_output:
            raise loss.without_output(self.label)

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return _psd_if_convex(loss)


BUILTIN: dict[str, type[NamedExpr]] = {
    cls.name: cls
    for cls in (
        Hessian,
        GGN,
        MonteCarloGGN,
        Fisher,
        MonteCarloFisher,
        Residual,
        Covariance,
        CenteredCovariance,
        Jacobian,
        LossHessian,
    )
}
"""The built-in terms by name."""

ALIASES: dict[str, str] = {"empirical_fisher": "covariance"}
"""Other names of built-in terms."""

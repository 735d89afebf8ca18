"""The four terms, by class statistics of each product: one pass for the statistics, one for the product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from curvalg import DatasetTerm, Facts, LossError, LossFacts, Term
from curvalg_plugins.hierarchical.extended import Extended, divided, off_diagonal

if TYPE_CHECKING:
    from torch import Tensor

    from curvalg import Batch

Own = Literal["within", "same"]


def require_softmax(label: str, loss: LossFacts | None) -> None:
    """Raise LossError unless the loss is softmax cross-entropy, whose GGN alone has this decomposition."""
    if loss is None or not (loss.classes and loss.fisher_is_ggn):
        name = "a problem without a loss" if loss is None else loss.name
        raise LossError(
            f"{label} is defined for softmax cross-entropy (nn.CrossEntropyLoss, curvalg.losses.CrossEntropy), not for {name}"
        )


class Hierarchical(DatasetTerm):
    """The base of the terms: class weights W [c, k] prepared once, class means u [c, k] of the slopes per product."""

    def validate(self, loss: LossFacts | None) -> None:
        require_softmax(self.label, loss)

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return Facts(psd=True)

    def prepare(self, batch: Batch) -> Tensor:
        extended = Extended(batch)
        return extended.class_sums(extended.w)

    def reduce(self, batch: Batch, tangent: Tensor, prepared: Any) -> Tensor:
        extended = Extended(batch)
        return extended.class_sums(extended.w * extended.slopes(tangent))

    def cotangent_dot(self, batch: Batch, tangent: Tensor, prepared: Tensor, totals: Tensor) -> Tensor:  # type: ignore[override]
        extended = Extended(batch)
        return extended.cotangent(extended.w * self.coefficients(extended, tangent, prepared, totals))

    def coefficients(self, extended: Extended, tangent: Tensor, weights: Tensor, sums: Tensor) -> Tensor:
        """The coefficients that g_ikᵀ v becomes in this term, (P, C)."""
        raise NotImplementedError


@dataclass(frozen=True)
class GGNClass(Hierarchical):
    """Between-class part Σ_c W_c ḡ_c ḡ_cᵀ of the GGN, of rank at most C; its spectrum holds the C outliers.

    See :func:`curvalg_plugins.hierarchical.ggn_class`.
    """

    name: ClassVar[str] = "ggn_class"
    symbol: ClassVar[str] = r"G_{\mathrm{class}}"

    def coefficients(self, extended: Extended, tangent: Tensor, weights: Tensor, sums: Tensor) -> Tensor:
        off = off_diagonal(extended.classes, weights)
        return extended.of_label(off * _class_means(weights, sums))


@dataclass(frozen=True)
class GGNCross(Hierarchical):
    """Between-cross-class part Σ_c Σ_{k≠c} W_ck (ḡ_ck − ḡ_c)(ḡ_ck − ḡ_c)ᵀ of the GGN, of rank at most C(C − 2).

    See :func:`curvalg_plugins.hierarchical.ggn_cross`.
    """

    name: ClassVar[str] = "ggn_cross"
    symbol: ClassVar[str] = r"G_{\mathrm{cross}}"

    def coefficients(self, extended: Extended, tangent: Tensor, weights: Tensor, sums: Tensor) -> Tensor:
        off = off_diagonal(extended.classes, weights)
        return extended.of_label(off * (divided(sums, weights) - _class_means(weights, sums)))


@dataclass(frozen=True)
class GGNWithin(Hierarchical):
    """Within-cross-class part Σ_i Σ_k w_ik (g_ik − ḡ_ck)(g_ik − ḡ_ck)ᵀ of the GGN, c = y_i.

    See :func:`curvalg_plugins.hierarchical.ggn_within`.
    """

    own: Own = "within"
    name: ClassVar[str] = "ggn_within"
    symbol: ClassVar[str] = r"G_{\mathrm{within}}"

    def coefficients(self, extended: Extended, tangent: Tensor, weights: Tensor, sums: Tensor) -> Tensor:
        return within(extended, tangent, weights, sums, self.own)


@dataclass(frozen=True)
class GGNSame(Hierarchical):
    """Same-class part Σ_c W_cc ḡ_cc ḡ_ccᵀ of the GGN, of rank at most C.

    See :func:`curvalg_plugins.hierarchical.ggn_same`.
    """

    name: ClassVar[str] = "ggn_same"
    symbol: ClassVar[str] = r"G_{\mathrm{same}}"

    def coefficients(self, extended: Extended, tangent: Tensor, weights: Tensor, sums: Tensor) -> Tensor:
        return extended.own * extended.of_label(divided(sums, weights))


@dataclass(frozen=True)
class GGNSameSpread(Term):
    """Same-class part with the spread inside it, Σ_i w_iy g_iy g_iyᵀ with y = y_i: one pass, no class means.

    See :func:`curvalg_plugins.hierarchical.ggn_same`.
    """

    own: Own = "within"
    name: ClassVar[str] = "ggn_same"
    symbol: ClassVar[str] = r"G_{\mathrm{same}}"

    def validate(self, loss: LossFacts | None) -> None:
        require_softmax(self.label, loss)

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return Facts(psd=True)

    def cotangent_dot(self, batch: Batch, tangent: Tensor) -> Tensor:
        extended = Extended(batch)
        return extended.cotangent(extended.w * extended.own * extended.slopes(tangent))

    def factor(self, batch: Batch) -> Tensor:
        extended = Extended(batch)
        return batch.spread(extended.cotangent(extended.w.sqrt() * extended.own)[None])


def within(extended: Extended, tangent: Tensor, weights: Tensor, sums: Tensor, own: Own) -> Tensor:
    """The slopes s_ik − u_ck, without k = y_i where that part belongs to the same-class term."""
    spread = extended.slopes(tangent) - extended.of_label(divided(sums, weights))
    return spread if own == "within" else spread * (1 - extended.own)


def _class_means(weights: Tensor, sums: Tensor) -> Tensor:
    """The means u_c = Σ_{k≠c} sums_ck / Σ_{k≠c} W_ck, as a column [c, 1]."""
    off = off_diagonal(weights.shape[0], weights)
    return divided((off * sums).sum(1, keepdim=True), (off * weights).sum(1, keepdim=True))

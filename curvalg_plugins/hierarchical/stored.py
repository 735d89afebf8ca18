"""The hierarchical terms from stored class means ḡ_ck: C² gradients, computed once, and then no second pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from curvalg import DatasetTerm, Expr, Facts, LossFacts, LowRank, MatrixTerm
from curvalg_plugins.hierarchical.extended import Extended, divided, off_diagonal
from curvalg_plugins.hierarchical.terms import Hierarchical, Own, require_softmax, within

if TYPE_CHECKING:
    from torch import Tensor

    from curvalg import Batch, Layout

Stats = dict[str, Any]


def class_gradients(batch: Batch) -> Stats:
    """The weights W [c, k], and W_ck ḡ_ck = Σ_{i: y_i = c} w_ik g_ik as rows [c, k, D]; C² backward passes."""
    extended = Extended(batch)
    classes = extended.classes
    sums: Tensor | None = None
    for c in range(classes):
        for k in range(classes):
            chosen = extended.w.new_zeros(extended.w.shape)
            chosen[:, k] = extended.w[:, k] * extended.own[:, c]
            row = batch.vjp(extended.cotangent(chosen))
            sums = row.new_empty(classes, classes, len(row)) if sums is None else sums
            sums[c, k] = row
    return {
        "weights": extended.class_sums(extended.w),
        "sums": sums,
    }


class LowRankTerm(MatrixTerm):
    """A term of rank at most C² that finishes as an explicit low-rank matrix."""

    def validate(self, loss: LossFacts | None) -> None:
        require_softmax(self.label, loss)

    def facts(self, loss: LossFacts | None = None) -> Facts:
        return Facts(psd=True)

    def accumulate(self, batch: Batch, prepared: None = None) -> Stats:
        return class_gradients(batch)

    def finish(self, stats: Stats, layout: Layout, prepared: None = None) -> Expr:
        return LowRank(self.columns(stats["weights"], stats["sums"]).T.contiguous())

    def columns(self, weights: Tensor, sums: Tensor) -> Tensor:
        """Rows (rank, D) whose outer products make the matrix."""
        raise NotImplementedError


@dataclass(frozen=True)
class StoredClass(LowRankTerm):
    """``ggn_class`` from stored class means; see :func:`curvalg_plugins.hierarchical.ggn_class`."""

    stored: bool = False
    name: ClassVar[str] = "ggn_class"
    symbol: ClassVar[str] = r"G_{\mathrm{class}}"

    def columns(self, weights: Tensor, sums: Tensor) -> Tensor:
        total, mean = _class_mean(weights, sums)
        return total.sqrt()[:, None] * mean


@dataclass(frozen=True)
class StoredCross(LowRankTerm):
    """``ggn_cross`` from stored class means; see :func:`curvalg_plugins.hierarchical.ggn_cross`."""

    stored: bool = False
    name: ClassVar[str] = "ggn_cross"
    symbol: ClassVar[str] = r"G_{\mathrm{cross}}"

    def columns(self, weights: Tensor, sums: Tensor) -> Tensor:
        _, mean = _class_mean(weights, sums)
        deviations = weights.sqrt()[..., None] * (divided(sums, weights[..., None]) - mean[:, None])
        chosen = (off_diagonal(weights.shape[0], weights) > 0) & (weights > 0)
        return deviations[chosen]


@dataclass(frozen=True)
class StoredSame(LowRankTerm):
    """``ggn_same`` from stored class means; see :func:`curvalg_plugins.hierarchical.ggn_same`."""

    stored: bool = False
    name: ClassVar[str] = "ggn_same"
    symbol: ClassVar[str] = r"G_{\mathrm{same}}"

    def columns(self, weights: Tensor, sums: Tensor) -> Tensor:
        own = weights.diagonal()
        return own.sqrt()[:, None] * divided(sums[range(len(own)), range(len(own))], own[:, None])


@dataclass(frozen=True)
class StoredWithin(Hierarchical):
    """``ggn_within`` with stored class means; see :func:`curvalg_plugins.hierarchical.ggn_within`."""

    own: Own = "within"
    stored: bool = False
    name: ClassVar[str] = "ggn_within"
    symbol: ClassVar[str] = r"G_{\mathrm{within}}"
    reduce = DatasetTerm.reduce  # type: ignore[assignment]  # none: the slopes of the class means are projected

    def prepare(self, batch: Batch) -> Any:
        return class_gradients(batch)

    def project(self, vector: Tensor, prepared: Any) -> Tensor:
        slopes: Tensor = prepared["sums"] @ vector
        return slopes

    def cotangent_dot(self, batch: Batch, tangent: Tensor, prepared: Any, totals: Tensor) -> Tensor:  # type: ignore[override]
        return super().cotangent_dot(batch, tangent, prepared["weights"], totals)

    def coefficients(self, extended: Extended, tangent: Tensor, weights: Tensor, sums: Tensor) -> Tensor:
        return within(extended, tangent, weights, sums, self.own)


def _class_mean(weights: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """The weights W_c = Σ_{k≠c} W_ck (C,), and the means ḡ_c (C, D)."""
    off = off_diagonal(weights.shape[0], weights)
    total = (off * weights).sum(1)
    return total, divided((off[..., None] * sums).sum(1), total[:, None])

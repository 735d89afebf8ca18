"""Cross-entropy with class indices or class probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvalg.errors import LossError
from curvalg.expr.facts import LossFacts
from curvalg.losses.closed_forms.softmax import SoftmaxLoss, SoftmaxPoint
from curvalg.losses.loss import Reduction, Structure
from curvalg.losses.validation import check_reduction, check_weight, real_target, some


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossEntropy(SoftmaxLoss):
    r"""Cross-entropy of softmax probabilities: −Σ_c ω_c q'_c log p_c, with q' = (1 − ε) q + ε/C.

    q is the probability target, or e_y for a class index y. At every position B = m (diag(p) − p pᵀ), with
    m = Σ_c ω_c q'_c, which is also α̂. A mean divides by Σ ω_y over positions that are not ignored, or, for
    probability targets, by the number of positions.

    Args:
        weight: ω, of shape (C,); None is 1.
        ignore_index: index targets of this value count for nothing.
        label_smoothing: ε, in [0, 1].
        reduction: ``"mean"`` or ``"sum"``.
        class_axis: the axis of the output that holds the C classes: 1 for (N, C, d1, …), -1 for (N, T, C).

    Raises:
        LossError: if an option is out of range.

    Reference: :class:`torch.nn.CrossEntropyLoss`.

    >>> point = CrossEntropy().at(torch.zeros(3, 2), torch.tensor([0, 1, -100]))
    >>> point.gradient()
    tensor([[-0.5000,  0.5000],
            [ 0.5000, -0.5000],
            [ 0.0000,  0.0000]])
    >>> CrossEntropy().denominator(torch.tensor([0, 1, -100]))
    2.0
    """

    weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: Reduction = "mean"
    class_axis: int = 1

    def __post_init__(self) -> None:
        check_reduction("CrossEntropy", self.reduction)
        check_weight("CrossEntropy", "weight", self.weight)
        if self.weight is not None and self.weight.ndim != 1:
            raise LossError(f"CrossEntropy: expected weight of shape (C,), got {tuple(self.weight.shape)}")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise LossError(f"CrossEntropy: expected label_smoothing in [0, 1], got {self.label_smoothing}")

    @classmethod
    def from_module(cls, module: nn.CrossEntropyLoss) -> CrossEntropy:
        """The loss with the options of a torch module."""
        return cls(
            weight=module.weight,
            ignore_index=module.ignore_index,
            label_smoothing=module.label_smoothing,
            reduction=module.reduction,  # type: ignore[arg-type]  # torch types it as str; __post_init__ checks it
        )

    @property
    def facts(self) -> LossFacts:
        """Convex unless a class weight is negative; a likelihood with m as sample weight."""
        convex = self.weight is None or bool((self.weight >= 0).all())
        return LossFacts("CrossEntropy", convex=convex, likelihood=True, fisher_is_ggn=True, classes=True)

    def tensors(self) -> dict[str, Tensor]:
        """The class weights, if any."""
        return {} if self.weight is None else {"weight": self.weight}

    def weights(self, target: Structure) -> Tensor:
        """The mass m of each position."""
        target = real_target("CrossEntropy", target)
        if target.is_floating_point():
            if target.ndim == 1:
                raise LossError(
                    f"CrossEntropy: expected labels as integers, or probabilities (N, C), got {target.dtype} of shape "
                    f"{tuple(target.shape)}; for class labels pass target.long()"
                )
            self._check_soft(target)
            return self._soft_mass(target)
        keep, labels = self._labels(target, None if self.weight is None else len(self.weight))
        return self._index_mass(keep, labels, torch.get_default_dtype() if self.weight is None else self.weight.dtype)

    def denominator(self, target: Structure) -> float:
        """Σ ω_y over positions that are not ignored; the number of positions for probability targets."""
        target = real_target("CrossEntropy", target)
        if target.is_floating_point():
            return float(target.numel() / max(target.shape[self.axis_of(target)], 1))
        keep, labels = self._labels(target, None if self.weight is None else len(self.weight))
        if self.weight is None:
            return float(keep.sum())
        # Counted per class and summed in double precision: exact in the counts, on every device.
        counts = torch.bincount(labels[keep], minlength=len(self.weight)).cpu().double()
        return float(counts @ self.weight.detach().cpu().double())

    def at(self, output: Structure, target: Structure) -> SoftmaxPoint:
        """The loss at an output (N, C, d1, …), by class_axis, and index or probability targets."""
        output, axis = self.checked_output(output)
        target = real_target("CrossEntropy", target)
        classes = output.shape[axis]
        if self.weight is not None and len(self.weight) != classes:
            raise LossError(
                f"CrossEntropy: expected weight of shape ({classes},), one for each class on axis {axis} of the output "
                f"{tuple(output.shape)}, got ({len(self.weight)},); check class_axis={self.class_axis}"
            )
        if target.is_floating_point():
            self._check_soft(target, output)
            return SoftTargetPoint(self, output, axis, target.to(output.dtype))
        self._check_index_shape(output, axis, target)
        keep, labels = self._labels(target, classes)
        return IndexPoint(self, output, axis, keep, labels)

    def numerator(self, output: Structure, target: Structure) -> Tensor:
        axis, target = self.axis_of(output), real_target("CrossEntropy", target)
        if target.is_floating_point():
            return self.soft_total(output, axis, target.to(output.dtype))
        return self.index_total(output, axis, *self._labels(target, output.shape[axis]))

    def live_denominator(self, target: Structure) -> Tensor | float:
        target = real_target("CrossEntropy", target)
        if self.weight is None or target.is_floating_point():
            return self.denominator(target)
        keep, labels = self._labels(target, len(self.weight))
        return self.weight[labels[keep]].sum()

    def index_total(self, output: Tensor, axis: int, keep: Tensor, labels: Tensor) -> Tensor:
        """The sum of numerators for class indices; torch's own has no derivative by the class weights."""
        epsilon, logarithms = self.label_smoothing, output.log_softmax(axis)
        kept = keep.to(output.dtype)
        omega = None if self.weight is None else self.weight.to(output)
        hit = logarithms.gather(axis, labels.unsqueeze(axis)).squeeze(axis) * kept
        total = -(1 - epsilon) * (hit if omega is None else hit * omega[labels]).sum()
        if not epsilon:
            return total
        spread = logarithms.movedim(axis, -1) * kept.unsqueeze(-1)
        return total - epsilon / output.shape[axis] * (spread if omega is None else spread * omega).sum()

    def soft_total(self, output: Tensor, axis: int, target: Tensor) -> Tensor:
        """The sum of numerators for probability targets, by torch."""
        return F.cross_entropy(
            output.movedim(axis, 1),
            target.movedim(axis, 1),
            weight=None if self.weight is None else self.weight.to(output),
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )

    def class_weights(self, like: Tensor, axis: int = -1, ndim: int = 1) -> Tensor | None:
        """ω with the data type and device of ``like``, laid out along one of ``ndim`` axes."""
        if self.weight is None:
            return None
        shape = [1] * ndim
        shape[axis] = -1
        return self.weight.detach().to(like).reshape(shape)

    def soft(self, target: Tensor, axis: int) -> Tensor:
        """ω ∘ q', of the shape of the probability targets q."""
        epsilon = self.label_smoothing
        smoothed = target if epsilon == 0 else (1 - epsilon) * target + epsilon / target.shape[axis]
        omega = self.class_weights(target, axis, target.ndim)
        return smoothed if omega is None else omega * smoothed

    def _soft_mass(self, target: Tensor) -> Tensor:
        axis = self.axis_of(target)
        return self.soft(target, axis).sum(axis)

    def hit(self, keep: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """(1 − ε) ω_y of each position, 0 where ignored."""
        kept = keep.to(dtype)
        omega = self.class_weights(kept)
        return (1 - self.label_smoothing) * (kept if omega is None else omega[labels] * kept)

    def _index_mass(self, keep: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        kept = keep.to(dtype)
        omega = self.class_weights(kept)
        if omega is None:  # exactly 1, whatever (1 − ε) + ε rounds to
            return kept
        return self.hit(keep, labels, dtype) + self.label_smoothing * omega.mean() * kept

    def _labels(self, target: Tensor, classes: int | None) -> tuple[Tensor, Tensor]:
        """Which positions count, and labels in which ignored ones are replaced by class 0."""
        if target.dtype == torch.bool:
            raise LossError("CrossEntropy: expected integer or floating-point targets, got bool; use target.long()")
        target = target.long()
        keep = target != self.ignore_index
        upper = torch.iinfo(torch.long).max if classes is None else classes
        wrong = keep & ((target < 0) | (target >= upper))
        if some(wrong):
            place = tuple(torch.nonzero(wrong)[0].tolist())
            count = "at least 0" if classes is None else f"from 0 to {classes - 1}"
            raise LossError(
                f"CrossEntropy: expected labels {count} or ignore_index={self.ignore_index}, got "
                f"{target[place].item()} at {place}; correct the label, or set ignore_index or class_axis"
            )
        return keep, torch.where(keep, target, 0)

    def _check_soft(self, target: Tensor, output: Tensor | None = None) -> None:
        if self.ignore_index >= 0:
            raise LossError(
                f"CrossEntropy: ignore_index={self.ignore_index} means nothing for probability targets (floating "
                "point); give the ignored positions a target of zeros, or use class indices (target.long())"
            )
        self.check_probabilities(target, output)

    def _check_index_shape(self, output: Tensor, axis: int, target: Tensor) -> None:
        expected = output.shape[:axis] + output.shape[axis + 1 :]
        if target.shape == expected:
            return
        cure = "for outputs (B, T, C) with targets (B, T) use class_axis=-1; flattened outputs need target.flatten()"
        if target.shape == output.shape[:-1]:
            cure = "the target fits classes on the last axis: use CrossEntropy(class_axis=-1)"
        elif target.shape == output.shape[:1] + output.shape[2:]:
            cure = "the target fits classes on axis 1: use CrossEntropy(class_axis=1)"
        elif target.shape == output.shape:
            cure = "probability targets of the output's shape must be floating point: use target.float()"
        raise LossError(
            f"CrossEntropy: expected index targets of shape {tuple(expected)} for an output {tuple(output.shape)} with "
            f"classes on axis {axis} (class_axis={self.class_axis}), got {tuple(target.shape)}; {cure}"
        )


class IndexPoint(SoftmaxPoint):
    """Cross-entropy at one output and class indices."""

    def __init__(self, loss: CrossEntropy, output: Tensor, axis: int, keep: Tensor, labels: Tensor) -> None:
        self.loss, self.keep = loss, keep
        super().__init__(loss.facts, output, axis, loss._index_mass(keep, labels, output.dtype), labels)

    def value(self) -> Tensor:
        """The sum of numerators, by torch."""
        assert self.labels is not None
        return F.cross_entropy(
            self.output.movedim(self.axis, 1),
            torch.where(self.keep, self.labels, -1),
            weight=self.loss.class_weights(self.output),
            ignore_index=-1,
            label_smoothing=self.loss.label_smoothing,
            reduction="sum",
        )

    def gradient(self) -> Tensor:
        """m p − (1 − ε) ω_y e_y − ε ω/C, 0 where ignored."""
        assert self.labels is not None
        p, axis, loss = self.probabilities, self.axis, self.loss
        hit = loss.hit(self.keep, self.labels, p.dtype)
        result = (self.weights * p).scatter_add_(axis, self.labels.unsqueeze(axis), -hit.unsqueeze(axis))
        if loss.label_smoothing == 0:
            return self.balanced(result)
        omega = loss.class_weights(p, axis, p.ndim)
        spread = (loss.label_smoothing / p.shape[axis]) * self.keep.unsqueeze(axis).to(p.dtype)
        return self.balanced(result - (spread if omega is None else spread * omega))


class SoftTargetPoint(SoftmaxPoint):
    """Cross-entropy at one output and class probabilities."""

    def __init__(self, loss: CrossEntropy, output: Tensor, axis: int, target: Tensor) -> None:
        self.loss, self.target = loss, target
        self.pull = loss.soft(target, axis)
        super().__init__(loss.facts, output, axis, self.pull.sum(axis), target.argmax(axis))

    def value(self) -> Tensor:
        """The sum of numerators, by torch."""
        return self.loss.soft_total(self.output, self.axis, self.target).detach()

    def gradient(self) -> Tensor:
        """m p − ω q'."""
        return self.balanced(self.weights * self.probabilities - self.pull)

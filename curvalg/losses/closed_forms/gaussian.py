"""Gaussian negative log-likelihood of a predicted mean and variance."""

from __future__ import annotations

from dataclasses import dataclass

import optree
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvalg.errors import LossError
from curvalg.expr.facts import LossFacts
from curvalg.losses.loss import Loss, LossPoint, Reduction, Structure, rows
from curvalg.losses.validation import check_range, check_reduction, floating, real_target, same_shape

_NAME = "GaussianNLL"


@dataclass(frozen=True, kw_only=True)
class GaussianNLL(Loss):
    r"""Gaussian likelihood of outputs (μ, v): Σ (log v + r²/v)/2 with r = μ − t.

    B = [[1/v, −r/v²], [−r/v², r²/v³ − 1/(2v²)]] for every element, not positive semi-definite; the Fisher matrix is
    diag(1/v, 1/(2v²)). As in torch, v is raised to eps and derivatives pass through as if it had not been.
    A mean divides by the number of elements of the target.

    Args:
        full: whether to add log(2π)/2 per element.
        eps: the least variance.
        reduction: ``"mean"`` or ``"sum"``.

    Raises:
        LossError: if an option is out of range.

    Reference: :class:`torch.nn.GaussianNLLLoss`.

    >>> mean, variance = torch.zeros(1, 1), torch.full((1, 1), 2.0)
    >>> GaussianNLL().at((mean, variance), torch.ones(1, 1)).gradient()
    (tensor([[-0.5000]]), tensor([[0.1250]]))
    """

    full: bool = False
    eps: float = 1e-6
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        check_reduction(_NAME, self.reduction)
        if not self.eps > 0:
            raise LossError(f"{_NAME}: expected eps > 0, got {self.eps}")

    @classmethod
    def from_module(cls, module: nn.GaussianNLLLoss) -> GaussianNLL:
        """The loss with the options of a torch module."""
        reduction: Reduction = module.reduction  # type: ignore[assignment]  # str in torch
        return cls(full=module.full, eps=module.eps, reduction=reduction)

    @property
    def facts(self) -> LossFacts:
        """Not convex in (μ, v); a likelihood."""
        return LossFacts(_NAME, convex=False, likelihood=True, fisher_is_ggn=False)

    @property
    def positions(self) -> bool:
        """Mean and variance of an element are in two places of the output."""
        return False

    def weights(self, target: Structure) -> Tensor:
        """Ones, of the target's shape."""
        tensor = real_target(_NAME, target)
        dtype = tensor.dtype if tensor.is_floating_point() else torch.get_default_dtype()
        return torch.ones((), dtype=dtype, device=tensor.device).expand(tensor.shape)

    def denominator(self, target: Structure) -> float:
        """The number of elements of the target."""
        return float(real_target(_NAME, target).numel())

    def numerator(self, output: Structure, target: Structure) -> Tensor:
        mean, variance = output
        return self.total(mean, variance, real_target(_NAME, target).to(mean.dtype))

    def total(self, mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
        """The sum of numerators, by torch."""
        return F.gaussian_nll_loss(mean, target, variance, full=self.full, eps=self.eps, reduction="sum")

    def at(self, output: Structure, target: Structure) -> GaussianPoint:
        """The loss at (μ, v) and a target of μ's shape; v has that shape too, or 1 as its last size."""
        if not isinstance(output, (tuple, list)) or len(output) != 2:
            count = f" of {len(output)}" if isinstance(output, (tuple, list)) else ""
            raise LossError(
                f"{_NAME}: expected the output to be a tuple (mean, variance), got {type(output).__name__}{count}; "
                "return both from the model, or adapt it with Problem's forward="
            )
        mean, variance = floating(_NAME, output[0], "mean"), floating(_NAME, output[1], "variance")
        target = real_target(_NAME, target).to(mean.dtype)
        same_shape(_NAME, mean, target, "mean")
        if variance.shape not in (mean.shape, (*mean.shape[:-1], 1)):
            raise LossError(
                f"{_NAME}: expected a variance of shape {tuple(mean.shape)}, or with last size 1, got "
                f"{tuple(variance.shape)}; unsqueeze or expand it in the model"
            )
        check_range(_NAME, variance, variance >= 0, "variances that are not negative (pass them through softplus)")
        structure = optree.tree_structure(output)  # type: ignore[arg-type]  # narrowed to a tuple of Any
        return GaussianPoint(self, structure, mean, variance, target)


class GaussianPoint(LossPoint[Structure]):
    """Gaussian likelihood at one (μ, v) and target; flat results are the (n, −1) concatenation of both parts."""

    labels = None

    def __init__(
        self, loss: GaussianNLL, structure: optree.PyTreeSpec, mean: Tensor, variance: Tensor, target: Tensor
    ) -> None:
        self.loss, self.structure, self.facts = loss, structure, loss.facts
        self.mean, self.target = mean, target
        self.variance = variance.clamp(min=loss.eps)
        self.residual = mean - target
        self.noise_shape = tuple(self._flat(mean, variance).shape)
        self.weights = torch.ones((), dtype=mean.dtype, device=mean.device).expand(self.noise_shape)

    def value(self) -> Tensor:
        """The sum of numerators, by torch."""
        return self.loss.total(self.mean, self.variance, self.target)

    def gradient(self) -> Structure:
        """The gradient (r/v, (1/v − r²/v²)/2)."""
        r, v = self.residual, self.variance
        return self._build(r / v, (1 / v - (r / v).square()) / 2)

    def hvp(self, tangent: Structure) -> Structure:
        """B t, with the coupling of mean and variance."""
        of_mean, of_variance = tangent
        r, v = self.residual, self.variance
        coupling = -r / v.square()
        curvature = r.square() / v**3 - 1 / (2 * v.square())
        return self._build(of_mean / v + coupling * of_variance, coupling * of_mean + curvature * of_variance)

    def fisher_hvp(self, tangent: Structure) -> Structure:
        """The product diag(1/v, 1/(2v²)) t."""
        of_mean, of_variance = tangent
        per_mean, per_variance = self._information()
        return self.structure.unflatten([per_mean * of_mean, per_variance * of_variance])

    def factor(self) -> Tensor:
        """Raise LossError, as B is indefinite."""
        raise LossError(
            f"{_NAME}: the Hessian in (mean, variance) is not positive semi-definite and has no square root; use the "
            "fisher or fisher_mc instead of the ggn"
        )

    def pseudo_gradients(self, uniform: Tensor, *, fisher: bool = False) -> Tensor:
        """±√Fisher with a random sign for every entry, of shape (samples, n, −1); refused for B."""
        if not fisher:
            self.factor()
        self.require_noise(uniform)
        root = self._flat(*self._information()).sqrt()
        return torch.where(uniform < 0.5, -root, root)

    def _information(self) -> tuple[Tensor, Tensor]:
        v = self.variance
        # A variance shared along the last axis is informed by all of its elements.
        shared = self.mean.shape[-1] if v.shape != self.mean.shape else 1
        return (1 / v).expand(self.mean.shape), shared / (2 * v.square())

    def _build(self, of_mean: Tensor, of_variance: Tensor) -> Structure:
        if self.variance.shape != self.mean.shape:
            of_variance = of_variance.sum(-1, keepdim=True)
        return self.structure.unflatten([of_mean, of_variance])

    @staticmethod
    def _flat(of_mean: Tensor, of_variance: Tensor) -> Tensor:
        return torch.cat([rows(of_mean), rows(of_variance)], 1)

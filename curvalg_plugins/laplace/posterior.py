"""The Laplace approximation of a posterior, and what is asked of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from curvalg import (
    CurvatureOperator,
    Expr,
    ExpressionError,
    FactsError,
    OptionError,
    Problem,
    inv_sqrt,
    inverse,
    parse,
)
from curvalg.estimate import functional_variance
from curvalg.losses import BCEWithLogits, CrossEntropy
from curvalg_plugins.laplace.draws import Spread, spread_by_blocks
from curvalg_plugins.laplace.evidence import tuned
from curvalg_plugins.laplace.likelihood import Likelihood, likelihood_of, require_sigma
from curvalg_plugins.laplace.moved import require_unmoved
from curvalg_plugins.laplace.prediction import Link, Prediction, drawn, probit, require_link
from curvalg_plugins.laplace.prior import By, Precisions, as_expression, as_vector, groups_by, precisions
from curvalg_plugins.laplace.spectrum import Spectrum, spectra, within

GRID = tuple(10 ** (k / 4) for k in range(-16, 17))
"""Precisions that validation tries: from 1e-4 to 1e4."""
FACTORS = tuple(10 ** (k / 8) for k in range(-12, 13))
"""Multiples of a prior in its picture: beyond, the penalty hides where the evidence is largest."""
STEPS = 200
"""The most steps of a fixed point, where precisions have to be found together."""


@dataclass(frozen=True, eq=False)
class Posterior:
    r"""A normal distribution of the parameters around their present values; made by :func:`laplace`.

    Precision P = β G + diag(δ), with the curvature G of the loss, the precisions δ of the prior, and the number β that turns
    the loss into − log p(data | θ): N for a mean loss over N samples, 1 for a sum; over 2σ² for a squared error. Bishop,
    Pattern Recognition and Machine Learning, 2006, §4.4 and §5.7.

    Args:
        problem: the training problem.
        curvature: G, arrays where it has some.
        prior: δ of each parameter, by name.
        sigma: standard deviation of the noise of regression.
        mean: the parameters (D,).
        likelihood: of the training data at the mean.
        state: all parameters and buffers of the model, by name; where they move, every method raises StaleError.
    """

    problem: Problem
    curvature: Expr = field(repr=False)
    prior: Precisions
    sigma: float
    mean: Tensor = field(repr=False)
    likelihood: Likelihood = field(repr=False)
    state: Mapping[str, Tensor] = field(repr=False)

    # -- the distribution -----------------------------------------------------------------------------------------------

    @property
    def precision(self) -> Expr:
        """The precision matrix P (D × D), as an expression."""
        require_unmoved(self.problem, self.state)
        return self.likelihood.scale(self.sigma) * self.curvature + as_expression(self.prior)

    @property
    def covariance(self) -> CurvatureOperator:
        """The covariance P⁻¹ (D × D), as an operator."""
        require_unmoved(self.problem, self.state)
        return self._covariance

    @cached_property
    def _covariance(self) -> CurvatureOperator:
        return inverse(self.precision).lower(self.problem)

    @cached_property
    def _spread(self) -> Spread:
        """A function of standard normal numbers (n, D) to numbers of the posterior's covariance."""
        arrays = self.precision.lower(self.problem).exact_rows("eigh") == 0  # nothing has to be built by products
        found = spread_by_blocks(self.covariance) if arrays else None
        if found is not None:
            return found
        root = inv_sqrt(self.precision).lower(self.problem)
        return lambda noise: (root @ noise.T).T

    @cached_property
    def _spectra(self) -> list[Spectrum] | None:
        return spectra(self.curvature.lower(self.problem))

    def _same(self, **changes: Any) -> Posterior:
        """The posterior with another prior or noise; the eigenvalues of the curvature stay."""
        made = replace(self, **changes)
        made.__dict__["_spectra"] = self._spectra
        return made

    def sample(self, n: int = 1, *, seed: int = 0) -> Tensor:
        """Draws of the parameters, (n, D).

        Args:
            n: how many.
            seed: of the draws.

        Raises:
            OptionError: n is no positive number.
            StaleError: the parameters have moved.
        """
        require_unmoved(self.problem, self.state)
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise OptionError(f"n is a positive integer, got {n!r}")
        generator = torch.Generator(device="cpu").manual_seed(seed)
        noise = torch.randn(n, self.problem.size, generator=generator, dtype=self.problem.dtype, device="cpu")
        return self._spread(noise.to(self.problem.device)) + self.mean

    # -- the evidence ---------------------------------------------------------------------------------------------------

    def log_evidence(self) -> float:
        """The logarithm of p(data), the probability of the data averaged over the prior, approximately:

        log p(data | θ) − ½ [ log det P − Σ log δ + Σ δ θ² ].

        MacKay, Neural Computation 4, 1992; Immer et al., arXiv 2104.04975.

        Raises:
            FactsError: P is not positive definite.
            ExpressionError: the log-determinant of the curvature is not known exactly.
            StaleError: the parameters have moved.
        """
        require_unmoved(self.problem, self.state)
        prior = as_vector(self.prior, self.problem.layout)
        penalty = float((prior * self.mean.double().cpu().square()).sum())
        occam = self._log_determinant() - float(prior.log().sum())
        return self.likelihood.log(self.sigma) - (occam + penalty) / 2

    def _log_determinant(self) -> float:
        scale, layout = self.likelihood.scale(self.sigma), self.problem.layout
        groups: dict[float, list[str]] = {}
        for name in layout.names:
            groups.setdefault(self.prior[name], []).append(name)
        found = None if self._spectra is None else within(self._spectra, [tuple(names) for names in groups.values()])
        if found is None:
            total = self.precision.lower(self.problem).exact("logdet")
        else:
            parts = zip(found, groups, strict=True)
            total = sum(spectrum.log_determinant(scale, prior) for spectrum, prior in parts)
        if total is None:
            raise ExpressionError(
                f"laplace: the log-determinant of {self.curvature} is not known exactly; take a matrix of arrays, such as "
                "kfac, ekfac, ggn_diagonal or block_diagonal(ggn, by='module'), or fewer parameters"
            )
        if not math.isfinite(total):
            raise FactsError(
                "laplace: the precision is not positive definite, so that there is no normal distribution; take ggn or kfac "
                "instead of the Hessian, or a larger prior"
            )
        return float(total)

    def tune_prior(
        self,
        by: By = "all",
        *,
        noise: bool = False,
        validation: Any = None,
        grid: Sequence[float] = GRID,
        link: Link = "probit",
    ) -> Posterior:
        """The posterior with the precisions of the largest evidence, or of the best predictions for validation data.

        By the evidence every precision is the only root of γ(δ) = δ ‖θ‖² of its group, found by bisection from the eigenvalues
        of the curvature (MacKay 1992), between 1e-12 and 1e12. Where a block of the curvature reaches over several groups they
        are found together, by repeating δ ← γ / ‖θ‖², which is exact for kfac and for blocks of at most 4096 rows.

        Args:
            by: one precision for "all" parameters, for each "module" or each "parameter" tensor.
            noise: tune σ of regression by the evidence as well.
            validation: data as of :class:`~curvalg.Problem`, or a problem, whose mean log-probability is made largest instead
                by one precision for all, out of ``grid``.
            grid: precisions to try.
            link: of predictions for classification.

        Returns:
            Another posterior; this one stays as it is.

        Raises:
            OptionError: arguments that do not fit.
            ExpressionError: the eigenvalues, or the diagonal of P⁻¹, are not known exactly.
            StaleError: the parameters have moved.
        """
        require_unmoved(self.problem, self.state)
        groups = groups_by(by, self.problem.layout)
        if validation is not None:
            if by != "all" or noise:
                raise OptionError("validation= chooses one precision for all: leave by= and noise= out")
            return self._validated(validation, grid, link)
        if noise and not self.likelihood.normal:
            raise OptionError("noise=True is for regression with MSELoss")
        parts = self.problem.layout.unflatten(self.mean.double())
        squares = [sum(float(parts[name].square().sum()) for name in names) for names in groups]
        separate = None if self._spectra is None else within(self._spectra, groups)
        if separate is None:
            if noise:
                raise OptionError(
                    f"noise=True needs eigenvalues by group, but a block of the curvature reaches over several of by={by!r}; "
                    "pass by='all' or by='module', or tune σ first"
                )
            return self._together(groups, squares)
        first = [self.prior[names[0]] for names in groups]
        found, sigma = tuned(separate, squares, first, self.sigma, self.likelihood, noise)
        return self._same(prior=self._named(groups, found), sigma=sigma)

    def _named(self, groups: Sequence[tuple[str, ...]], values: Sequence[float]) -> Precisions:
        named = {name: value for names, value in zip(groups, values, strict=True) for name in names}
        return {name: named[name] for name in self.problem.layout.names}

    def _together(self, groups: Sequence[tuple[str, ...]], squares: Sequence[float]) -> Posterior:
        """Precisions of groups that blocks of the curvature reach over."""
        layout, now = self.problem.layout, self
        for _ in range(STEPS):
            diagonal = now.covariance.exact("diagonal")
            if diagonal is None:
                raise ExpressionError(
                    f"laplace: the diagonal of the covariance is not known exactly, and a block of {self.curvature} reaches "
                    "over several groups; take by='module' or by='all', kfac, or smaller blocks, as ekfac(joint=False)"
                )
            values = []
            for names, square in zip(groups, squares, strict=True):
                trace = sum(float(diagonal[layout.slices[name]].sum()) for name in names)
                size = sum(layout.shapes[name].numel() for name in names)
                values.append(min(max((size - now.prior[names[0]] * trace) / max(square, 1e-300), 1e-12), 1e12))
            before = [now.prior[names[0]] for names in groups]
            now = now._same(prior=now._named(groups, values))
            if all(abs(math.log(a / b)) <= 1e-8 for a, b in zip(before, values, strict=True)):
                break
        return now

    def _validated(self, validation: Any, grid: Sequence[float], link: Link) -> Posterior:
        data = validation if isinstance(validation, Problem) else self.problem.with_data(validation, whole=True)
        tried = [self._same(prior=precisions(float(value), self.problem.layout)) for value in grid]
        found = [posterior.log_probability(data, link=link) for posterior in tried]
        return tried[self.problem.group.first(found.index(max(found)))]  # one for all processes, whatever the rounding

    # -- predictions ----------------------------------------------------------------------------------------------------

    def _asked(self, data: Any) -> Problem:
        require_unmoved(self.problem, self.state)
        if not isinstance(data, Problem):
            return self.problem.with_inputs(data, whole=True)
        self.problem.require_same_function(data, "laplace: predictions")
        return data

    def functional_variance(self, problem: Any, *, diagonal: bool = False) -> Tensor:
        """The covariances J P⁻¹ Jᵀ of the outputs of each row, (N, C, C); see :func:`curvalg.estimate.functional_variance`.

        Args:
            problem: inputs, or a problem of the same model.
            diagonal: the variances alone, (N, C).

        Raises:
            StaleError: the parameters have moved.
            ProblemError: a problem whose model computes another function.
        """
        return functional_variance(self.covariance, self._asked(problem), diagonal=diagonal)

    def predict(self, inputs: Any, *, link: Link = "probit", samples: int = 1000, seed: int = 0) -> Prediction:
        """Predictions of the linearised network: targets with their variances, or probabilities of classes.

        Args:
            inputs: data as of :class:`~curvalg.Problem` without targets, as a tensor (N, ...), or a problem of the same model.
            link: from outputs z with variances v to probabilities: "probit", softmax(z / √(1 + π v / 8)); "mc", the mean
                softmax of draws from the joint distribution of the outputs of a row; or "mean", softmax(z), as of the network.
            samples: draws, for "mc".
            seed: of the draws.

        Raises:
            OptionError: an unknown link, or a loss that gives no predictions.
            StaleError: the parameters have moved.
        """
        require_link(link)
        problem = self._asked(inputs)
        with problem.group.together("predict"), problem.batches() as batches:
            found = [batch.output for batch in batches]
            outputs = problem.group.rows(torch.cat(found) if found else None)
        joint = link == "mc" and isinstance(self.problem.loss, CrossEntropy)
        covariance = functional_variance(self.covariance, problem, diagonal=not joint)
        variance = (covariance.diagonal(dim1=1, dim2=2) if joint else covariance).reshape(outputs.shape)
        shown = inputs if isinstance(inputs, Tensor) else None
        if self.likelihood.normal:
            return Prediction(outputs, variance + self.sigma**2, variance, shown, False)
        if not isinstance(self.problem.loss, CrossEntropy | BCEWithLogits):
            raise OptionError(
                f"predictions are for MSE, CrossEntropy and BCEWithLogits, got {type(self.problem.loss).__name__}; take "
                "functional_variance() or sample()"
            )
        p = self._probabilities(outputs, covariance, variance, link, samples, seed)
        return Prediction(p, p * (1 - p), variance, shown, True)

    def _probabilities(
        self, outputs: Tensor, covariance: Tensor, variance: Tensor, link: Link, samples: int, seed: int
    ) -> Tensor:
        loss = self.problem.loss
        axis = loss.class_axis if isinstance(loss, CrossEntropy) else None

        def squashed(z: Tensor) -> Tensor:
            if axis is None:
                return z.sigmoid()
            return z.softmax(axis if axis < 0 else axis + z.ndim - outputs.ndim)

        if link == "mean":
            return squashed(outputs)
        if link == "probit":
            return squashed(probit(outputs, variance))
        flat = outputs.reshape(len(outputs), -1)
        if axis is None:  # every output by itself
            generator = torch.Generator(device="cpu").manual_seed(seed)
            noise = torch.randn(samples, *outputs.shape, generator=generator, dtype=outputs.dtype, device="cpu").to(
                outputs.device
            )
            return squashed(outputs + noise * variance.sqrt()).mean(0)
        return squashed(drawn(flat, covariance, samples, seed).reshape(-1, *outputs.shape)).mean(0)

    def log_probability(self, problem: Problem, *, link: Link = "probit") -> float:
        """The logarithm of the probability of the targets of a problem under the predictions, summed.

        Args:
            problem: of the same model and loss, with targets.
            link: of predictions for classification.

        Raises:
            OptionError: a loss that gives no predictions.
            StaleError: the parameters have moved.
        """
        require_link(link)
        found = self.predict(problem, link=link)
        start, total, loss = _rows_before(problem), 0.0, self.problem.loss
        with problem.group.together("log_probability"), problem.batches() as batches:
            for batch in batches:
                rows = slice(start, start := start + len(batch.output))
                mean, variance = found.mean[rows], found.variance[rows]
                if self.likelihood.normal:
                    target = batch.target.reshape(mean.shape).to(mean)
                    total += float(torch.distributions.Normal(mean, variance.sqrt()).log_prob(target).sum())
                else:  # of probabilities, the loss of their logits
                    assert loss is not None
                    logits = mean.logit() if isinstance(loss, BCEWithLogits) else mean.log()
                    total -= float(loss.at(logits, batch.target).value())
            return math.fsum(number for (number,) in problem.group.numbers(total))

    # -- pictures -------------------------------------------------------------------------------------------------------

    def plot(self, ax: Any = None, *, factors: Sequence[float] = FACTORS) -> Any:
        """Draw the log evidence against all precisions of the prior, multiplied by common factors; returns matplotlib axes.

        Args:
            ax: axes, new ones by default.
            factors: to multiply the precisions by; 1 is marked.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        single = len(set(self.prior.values())) == 1
        unit = next(iter(self.prior.values())) if single else 1.0
        scaled = [{name: value * factor for name, value in self.prior.items()} for factor in factors]
        ax.plot([unit * f for f in factors], [self._same(prior=prior).log_evidence() for prior in scaled])
        ax.axvline(unit, color="0.6", linewidth=1, zorder=0)
        ax.set_xscale("log")
        ax.set_xlabel("precision δ of the prior" if single else "factor of the precisions of the prior")
        ax.set_ylabel("log evidence")
        return ax


def laplace(
    problem: Problem, curvature: str | Expr = "kfac", *, prior: float | Mapping[str, float] = 1.0, sigma: float = 1.0
) -> Posterior:
    r"""The Laplace approximation of the posterior of a trained network's parameters.

    The posterior is normal around the present parameters θ with the precision

        P = N G + diag(δ)          mean loss over N samples (or of total class weight N)
        P = G + diag(δ)            sum loss
        P = N G / (2σ²) + diag(δ)  mean squared error over N numbers; G / (2σ²) for a sum

    where G is the curvature of the loss as the problem has it and δ the precision of a normal prior around zero. Both
    reductions give one posterior: that of − log p(data | θ) + ½ Σ δ θ², at whose minimum the parameters should be (a weight
    decay of δ / N for a mean loss). MacKay, Neural Computation 4, 1992; Daxberger et al., arXiv 2106.14806.

    ::

        posterior = laplace(Problem(model, nn.CrossEntropyLoss(), loader), "kfac").tune_prior()
        probabilities = posterior.predict(X).mean

    Some layers alone (the last one, say) are ``Problem(model, loss, data, params="head.*")``; the others are fixed then. With
    ``curvature="ggn"`` everything goes through the kernel of the training outputs where these are fewer than the parameters:
    the Gaussian process of the linearised network, exactly (Immer et al., arXiv 2008.08400).

    Args:
        problem: the model with its training data and a loss that is a negative log-likelihood.
        curvature: G: a name or a text such as "kfac", "ekfac", "ggn_diagonal", "ggn" or "kfac(joint=False)", or an expression.
        prior: δ: a number, or numbers by patterns of names, {"*": 1.0, "*.bias": 0.1}, of which the last that fits counts.
        sigma: standard deviation of the noise of a squared error.

    Returns:
        Posterior: predictions, draws, evidence, and a better prior.

    Raises:
        LossError: a loss that is no negative log-likelihood.
        OptionError: a prior or a noise that makes no sense.
        ExpressionError: no symmetric matrix on the parameters.

    >>> import torch
    >>> from curvalg import Problem
    >>> torch.manual_seed(0) and None
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    >>> X = torch.randn(30, 2)
    >>> problem = Problem(net, torch.nn.CrossEntropyLoss(), (X, torch.arange(30) % 3))
    >>> posterior = laplace(problem, "kfac").tune_prior(by="module")
    >>> posterior.predict(torch.randn(5, 2)).mean.shape, posterior.sample(4).shape
    (torch.Size([5, 3]), torch.Size([4, 51]))
    """
    if not isinstance(problem, Problem):
        raise OptionError(
            f"laplace: expected a Problem, got {type(problem).__name__}; make one by Problem(model, loss, data)"
        )
    if problem.layout.whole is not problem.layout:
        raise ExpressionError(
            "laplace: a posterior needs whole matrices over the parameters, but those of the problem are sharded; make the "
            "Problem of a whole model on every process (group= without shard=)"
        )
    expr = parse(curvature) if isinstance(curvature, str) else curvature
    if not isinstance(expr, Expr) or expr.facts(problem.facts).symmetric is False:
        raise ExpressionError(f"laplace: expected a symmetric matrix such as 'kfac', got {curvature!r}")
    likelihood = likelihood_of(problem)
    known = precisions(prior, problem.layout)
    state = problem.snapshot().state
    mean = torch.cat([state[name].reshape(-1) for name in problem.layout.names]).to(problem.device, problem.dtype)
    return Posterior(problem, _arrays(expr, problem), known, require_sigma(likelihood, sigma), mean, likelihood, state)


def _rows_before(problem: Problem) -> int:
    """The rows of the outputs of the processes before this one."""
    if problem.group.alone:
        return 0
    with problem.group.together("log_probability"), problem.batches() as batches:
        here = sum(len(batch.output) for batch in batches)
        return sum(int(rows) for (rows,) in problem.group.numbers(here)[: problem.group.rank])


def _arrays(expr: Expr, problem: Problem) -> Expr:
    """The curvature as arrays, so that another prior needs no data; as it is, where it is known by products alone."""
    if expr.lower(problem).exact_rows("eigh") != 0:
        return expr
    return expr.bound(problem)

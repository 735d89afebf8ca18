"""Standard errors, estimated from the random vectors that make them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from scipy.special import ndtr, stdtrit
from torch import Tensor

from curvalg.tensors.memory import small, wide, widest
from curvalg.tensors.spaces import VectorSpace
from curvalg.tensors.spaces.long_vectors import parts


def standard_error(samples: Tensor) -> Tensor:
    """The standard error of the mean of independent samples along the first axis; infinite for a single one."""
    return samples.std(0) / len(samples) ** 0.5 if len(samples) > 1 else torch.full_like(samples[0], torch.inf)


def shared_error(directions: Tensor, missed: Tensor) -> Tensor:
    """The standard error of a mean of leave-one-out estimates that lack much the same.

    Estimate i leaves out one direction sᵢ of the basis, with sᵢᵀAsᵢ of the trace, and puts (ωᵢᵀsᵢ)² sᵢᵀAsᵢ in its place, of
    variance 2 (sᵢᵀAsᵢ)². Where R is nearly singular, as just before the rank of the operator is reached, all sᵢ are nearly
    parallel: then the estimates agree with each other and are wrong together, which their spread does not show. So their
    covariances are taken as 2 (sᵢᵀsⱼ)² sᵢᵀAsᵢ sⱼᵀAsⱼ.
    """
    variance: Tensor = 2 * missed @ (directions.T @ directions).square() @ missed / len(missed) ** 2
    return torch.sqrt(variance.clamp_min(0))


@dataclass(frozen=True)
class Rest:
    """The operator outside of a subspace, B = (I − QQᵀ)A(I − QQᵀ), with vectors u whose uᵀBu estimate its trace.

    The u are uniform on the sphere of radius √d in the d-dimensional complement of Q. There, a quadratic form less its mean is
    a spherical harmonic of degree two, so that its variance is 2 E‖w‖² with w = Bu − (uᵀBu / d) u, exactly, for symmetric B:
    its Dirichlet form over the eigenvalue (Stein and Weiss, Fourier Analysis on Euclidean Spaces, 1971, chapter IV). A mean of
    squared norms spreads far less than the squared deviations of few samples do.

    Args:
        basis, images: Q and AQ, as rows (k, n).
        vectors, products: ω and Aω, as rows (m, n); u is what is left of ω, normalised. Products that are in the span of Q may
            be None, with the negative of their coefficients as a part of ``projected``.
        inside: coefficients X (k, m) of the projections of ω onto Q, or onto a part of it for each vector.
        projected: coefficients (k, m) of the projections of A(ω − Qx) onto the same.
        scale: d / ‖ω − Qx‖², (m,).
        samples: uᵀBu, (m,).
        dimension: d.
        space: that the rows are in.
    """

    basis: Tensor = field(repr=False)
    images: Tensor = field(repr=False)
    vectors: Tensor = field(repr=False)
    products: Tensor | None = field(repr=False)
    inside: Tensor = field(repr=False)
    projected: Tensor = field(repr=False)
    scale: Tensor
    samples: Tensor
    dimension: int
    space: VectorSpace = field(repr=False)

    def error(self, symmetric: bool | None, shared: Tensor | None = None) -> Tensor:
        """The standard error of the mean of the samples, for use with the factor two of a normal distribution.

        The squared norms are few and of few dimensions, so the variance is uncertain: as that of Student's t with as many
        degrees of freedom as the multiple of χ² that is as uncertain (Satterthwaite, Biometrics Bulletin 1946), which without
        covariances are m (tr B²)² / tr B⁴. Two of the errors that are given cover what two standard errors of a normal
        distribution do, 95.4 %.

        Args:
            symmetric: whether the operator is known to be.
            shared: covariances with all other samples, unbiased, (m,); None where samples are independent.
        """
        gram, products = self._sums(symmetric or False)
        m, own = len(gram), 2 * gram.diagonal().sum()
        if m == 1:
            return own.sqrt() * _widening(1.0)
        pairs = (gram.square().sum() - gram.diagonal().square().sum()) / (m * (m - 1))
        # tr B⁴ is never less than what would leave a single dimension.
        uncertainty = 2 * own.square() / (m * (own / 2 / m).square() / pairs).nan_to_num(m).clamp_min(m)
        own = own if products is None else own * _symmetric_share(products)
        variance = own
        if shared is not None:
            # The sum is not negative but by chance; what each sample has in common with others counts as a draw of its own.
            variance, uncertainty = own + shared.sum().clamp_min(0), uncertainty + m * shared.var()
        freedom = (2 * variance.square() / uncertainty).nan_to_num(m).clamp(1, 1e6)
        return variance.sqrt() / m * _widening(float(freedom))

    def _sums(self, symmetric: bool) -> tuple[Tensor, Tensor | None]:
        """The sums wᵢᵀwⱼ and, unless B is symmetric, uᵢᵀBuⱼ, (m, m) each, in float64 over some entries at a time."""
        m, device = len(self.vectors), self.vectors.device
        gram, products = torch.zeros(2, m, m, dtype=widest(device), device=device)
        X, E, scale = (t.to(gram) for t in (self.inside.T, self.projected.T, self.scale.sqrt()[:, None]))
        ratio = (self.samples / self.dimension).to(gram)[:, None]
        # w = Bu − ratio · u, with u = scale · (ω − XQ) and Bu = scale · (Aω − XZ − EQ).
        of_basis, of_images, of_vectors = scale * (ratio * X - E), -scale * X, -scale * ratio
        rows = [t for t in (self.basis, self.images, self.vectors, self.products) if t is not None]
        for part in parts(self.vectors.shape[1], sum(map(len, rows)) + m, device):
            Q, Z, omega, *Y = (wide(t[:, part]) for t in rows)
            w = of_vectors * omega
            w.addmm_(of_basis, Q).addmm_(of_images, Z)
            if Y:
                w.addcmul_(scale, Y[0])
            gram.addmm_(w, self.space.weighed_part(w, part).T)
            if not symmetric:
                u = scale * (omega - X @ Q)
                products.addmm_(u, self.space.weighed_part(w + ratio * u, part).T)
        if symmetric:
            return small(self.space.total(gram)), None
        gram, products = self.space.totals(gram, products)
        return small(gram), small(products)


def _widening(freedom: float) -> float:
    """The quantile of Student's t where the normal distribution has two, over two."""
    return float(stdtrit(freedom, ndtr(2.0))) / 2


def _symmetric_share(products: Tensor) -> Tensor:
    """The ratio ‖(B + Bᵀ)/2‖² / ‖B‖² by the products of different vectors: only the symmetric part of B makes an error."""
    other = products - torch.diag(products.diagonal())
    whole = other.square().sum()
    return ((other + other.T) / 2).square().sum() / whole if whole > 0 else torch.ones_like(whole)

"""What contestants are asked, and how far their answers may be apart."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A row of the table of questions.

    Args:
        says: what is computed, and what is inside the time.
        tolerance: relative distance of two answers that count as equal.
        random: whether the answer is an estimate, so that a distance beyond the tolerance may be chance.
    """

    says: str
    tolerance: float = 1e-3
    random: bool = False


TERMS = ("hessian", "ggn", "covariance")
"""The matrices whose sum is "sum"."""

PRODUCTS = (*TERMS, "sum")

CHUNK = 55
"""Positions of a language model that curvalg takes at a time by itself, of a vocabulary of 50000."""

QUESTIONS = {
    "gradient": Question("one gradient of the loss over all data: the unit of the products"),
    "chunked gradient": Question(f"the same of a language model, the loss taken {CHUNK} positions at a time"),
    "hessian": Question("a product with the Hessian"),
    "ggn": Question("a product with the GGN"),
    "covariance": Question("a product with the uncentred covariance of the gradients of single samples"),
    "sum": Question("a product with hessian + ggn + covariance"),
    "kfac exact": Question("KFAC of the GGN, built and multiplied once"),
    "kfac empirical": Question("KFAC of the covariance, built and multiplied once"),
    "ekfac exact": Question("EKFAC of the GGN, built and multiplied once"),
    "ekfac empirical": Question("EKFAC of the covariance, built and multiplied once"),
    "kfac inverse": Question("(KFAC of the covariance + damping)⁻¹ v of linear layers and convolutions, all inside"),
    "kfac inverse again": Question("the same for a further vector, with everything kept"),
    "ggn diagonal": Question("the exact diagonal of the GGN"),
    "solve gram": Question("(GGN + damping)⁻¹ v, set-up included, exact through the Gram matrix", 1e-2),
    "solve gram again": Question("the same for a further right-hand side", 1e-2),
    "solve gram other damping": Question("the same after another damping has been solved", 1e-2),
    "solve cg": Question("(GGN + damping)⁻¹ v by conjugate gradients, set-up included", 1e-2),
    "solve cg kfac": Question("the same, preconditioned by damped KFAC, which is built inside the time", 1e-2),
    "solve cg nystrom": Question("the same, preconditioned by a damped Nyström approximation", 1e-2),
    "eigenvalues": Question("the largest eigenvalues of the Hessian, set-up included", 1e-2),
    "density": Question(
        "the spectral density of the Hessian by Lanczos quadrature; its second moment", 0.1, random=True
    ),
    "trace ggn": Question("the trace of the GGN by a given number of products", 0.1, random=True),
    "influence scores": Question("scores of all samples for the first rows, EKFAC of the covariance at hand", 1e-2),
    "self influence": Question("the influence of every sample on itself, EKFAC of the covariance at hand", 1e-2),
    "functional variance": Question(
        "covariances of the outputs of single rows under a posterior, KFAC of the GGN at hand"
    ),
    "posterior draws": Question("draws of the parameters from that posterior; their total variance", 0.1, random=True),
    "trace hessian": Question("the trace of the Hessian by a given number of products", 0.1, random=True),
}

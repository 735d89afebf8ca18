"""Losses: one class each, with closed forms in output space. See :mod:`curvalg.problem.losses.base`."""

from __future__ import annotations

from curvalg.problem.losses.base import Loss, LossPoint
from curvalg.problem.losses.binary import BCEWithLogits
from curvalg.problem.losses.callable import NLL, CallableLoss
from curvalg.problem.losses.cross_entropy import CrossEntropy
from curvalg.problem.losses.gaussian import GaussianNLL
from curvalg.problem.losses.infer import infer_reduction
from curvalg.problem.losses.kl_div import KLDiv, KLDivWithLogits
from curvalg.problem.losses.poisson import PoissonNLL
from curvalg.problem.losses.regression import MSE, Huber, SmoothL1
from curvalg.problem.losses.resolve import resolve_loss

__all__ = [
    "MSE",
    "NLL",
    "BCEWithLogits",
    "CallableLoss",
    "CrossEntropy",
    "GaussianNLL",
    "Huber",
    "KLDiv",
    "KLDivWithLogits",
    "Loss",
    "LossPoint",
    "PoissonNLL",
    "SmoothL1",
    "infer_reduction",
    "resolve_loss",
]

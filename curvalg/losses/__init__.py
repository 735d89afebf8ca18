"""Losses with closed forms in output space, and the base class to write another.

>>> from curvalg.losses import CrossEntropy
>>> CrossEntropy(label_smoothing=0.1, class_axis=-1).facts.convex
True
"""

from __future__ import annotations

from curvalg.losses.base import Loss, LossPoint
from curvalg.losses.binary import BCEWithLogits
from curvalg.losses.callable import NLL, CallableLoss
from curvalg.losses.cross_entropy import CrossEntropy
from curvalg.losses.from_torch import resolve_loss
from curvalg.losses.gaussian import GaussianNLL
from curvalg.losses.infer import infer_reduction
from curvalg.losses.kl_div import KLDiv, KLDivWithLogits
from curvalg.losses.poisson import PoissonNLL
from curvalg.losses.regression import MSE, Huber, SmoothL1

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

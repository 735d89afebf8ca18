"""Losses with closed forms in output space, and the base class to write another.

>>> from curvalg.losses import CrossEntropy
>>> CrossEntropy(label_smoothing=0.1, class_axis=-1).facts.convex
True
"""

from __future__ import annotations

from curvalg.losses.callable import NLL, CallableLoss
from curvalg.losses.closed_forms.binary import BCEWithLogits
from curvalg.losses.closed_forms.cross_entropy import CrossEntropy
from curvalg.losses.closed_forms.gaussian import GaussianNLL
from curvalg.losses.closed_forms.kl_div import KLDiv, KLDivWithLogits
from curvalg.losses.closed_forms.poisson import PoissonNLL
from curvalg.losses.closed_forms.regression import MSE, Huber, SmoothL1
from curvalg.losses.from_torch import resolve_loss
from curvalg.losses.infer import infer_reduction
from curvalg.losses.loss import Loss, LossPoint

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

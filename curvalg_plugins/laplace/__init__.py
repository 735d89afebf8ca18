"""Laplace approximations: posteriors of the parameters of trained networks, their predictions and their evidence.

Laplace, 1774; MacKay, Neural Computation 4, 1992. :mod:`curvalg_plugins.laplace.backend` gives curvature to laplace-torch.
"""

from curvalg_plugins.laplace.posterior import Posterior, laplace
from curvalg_plugins.laplace.prediction import Prediction

__all__ = ["Posterior", "Prediction", "laplace"]

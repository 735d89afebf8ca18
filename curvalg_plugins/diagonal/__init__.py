"""Diagonals of curvature matrices."""

from curvalg_plugins.diagonal.covariance import CovarianceDiagonal
from curvalg_plugins.diagonal.ggn import GGNDiagonal

__all__ = ["CovarianceDiagonal", "GGNDiagonal"]

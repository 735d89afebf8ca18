"""Diagonals of curvature matrices, found through entry points."""

from curvalg_plugins.diagonal.covariance import CenteredCovarianceDiagonal, CovarianceDiagonal
from curvalg_plugins.diagonal.ggn import GGNDiagonal
from curvalg_plugins.diagonal.hessian import hessian_diagonal

__all__ = ["CenteredCovarianceDiagonal", "CovarianceDiagonal", "GGNDiagonal", "hessian_diagonal"]

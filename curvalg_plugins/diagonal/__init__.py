"""Diagonals of curvature matrices."""

from curvalg_plugins.diagonal.covariance import CovarianceDiagonal

__all__ = ["CovarianceDiagonal"]

"""Diagonals of curvature matrices, found through entry points; norms of single gradients by :func:`gradient_norms`."""

from typing import TYPE_CHECKING, Any

from curvalg_plugins.diagonal.covariance import CenteredCovarianceDiagonal, CovarianceDiagonal
from curvalg_plugins.diagonal.ggn import GGNDiagonal
from curvalg_plugins.diagonal.hessian import hessian_diagonal

if TYPE_CHECKING:
    from curvalg_plugins.diagonal.norms import gradient_norms as gradient_norms

__all__ = ["CenteredCovarianceDiagonal", "CovarianceDiagonal", "GGNDiagonal", "gradient_norms", "hessian_diagonal"]


def __getattr__(name: str) -> Any:
    if name != "gradient_norms":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from curvalg_plugins.diagonal.norms import gradient_norms  # needs torch, which listing the terms must not import

    return gradient_norms

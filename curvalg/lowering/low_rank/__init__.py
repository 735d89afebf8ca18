"""Matrices V Vᵀ with few columns: V by layers, the Gram matrix, and the neural tangent kernel."""

from curvalg.lowering.low_rank.factor import Factor, factor_of

__all__ = ["Factor", "factor_of"]

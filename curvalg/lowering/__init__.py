"""Lowering: from expressions and problems to operators."""

from curvalg.lowering.operator import CurvatureOperator, bound, lower

__all__ = ["CurvatureOperator", "bound", "lower"]

"""Lowering: from expressions and problems to operators."""

from curvalg.lowering.operator import CurvatureOperator, lower

__all__ = ["CurvatureOperator", "lower"]

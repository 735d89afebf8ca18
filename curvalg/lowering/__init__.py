"""Lowering: from expressions and problems to operators."""

from curvalg.lowering.lower import lower
from curvalg.lowering.operator import CurvatureOperator

__all__ = ["CurvatureOperator", "lower"]

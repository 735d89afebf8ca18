"""Inverses and square roots: what a matrix offers, and the solvers that take it."""

from curvalg.lowering.inverses.verified import swear

__all__ = ["swear"]

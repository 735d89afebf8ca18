"""Inverses and square roots: what a matrix offers, and the solvers that take it."""

"""Printing expressions: what a person would write, a tree, and LaTeX."""

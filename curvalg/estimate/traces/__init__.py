"""Sums of entries by random vectors: traces, diagonals and norms, a file for each method and for each quantity."""

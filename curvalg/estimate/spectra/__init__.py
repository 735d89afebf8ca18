"""Eigenvalues and singular values: a few with their vectors, or the density of all of them."""

"""The kinds of solver that accept a matrix."""

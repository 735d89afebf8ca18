"""Block-diagonals, sub-matrices and rows of blocks."""

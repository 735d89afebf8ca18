"""Random vectors: drawing and numbering them, averages over them, and the errors of these averages."""

"""Random vectors: how they are drawn and numbered, what is averaged over them, and how large the error of the average is."""

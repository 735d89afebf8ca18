"""Functions of operators: times vectors, and their traces."""

"""The right sides of the laws, a family a file; :mod:`curvalg.rewrite.laws` lists the laws."""

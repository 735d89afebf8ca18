"""The right sides of the laws, a family a file; which laws there are is listed in :mod:`curvalg.rewrite.laws`."""

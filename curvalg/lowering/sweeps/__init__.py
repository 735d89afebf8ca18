"""Passes over the data: sums of local terms, recorded once and multiplied many times."""

"""Batches, and what may change between two passes over them: order, contents, random draws."""

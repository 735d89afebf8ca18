"""Batches, and what may change between two passes over them: order, contents, random draws."""

from curvalg.problem.data.batches import Data
from curvalg.problem.data.randomness import DrawGuard
from curvalg.problem.data.row_hashes import fingerprint, same_order, same_rows, total

__all__ = ["Data", "DrawGuard", "fingerprint", "same_order", "same_rows", "total"]

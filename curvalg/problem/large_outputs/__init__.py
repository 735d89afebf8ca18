"""Outputs of vocabulary size, made and dropped chunk by chunk."""

from curvalg.problem.large_outputs.find_head import HeadNotes

__all__ = ["HeadNotes"]

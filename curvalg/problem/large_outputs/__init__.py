"""Outputs of vocabulary size, made and dropped chunk by chunk."""

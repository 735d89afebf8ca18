"""Processes that hold parts of the parameters."""

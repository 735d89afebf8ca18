"""Runs that can be stopped and resumed: the state of an algorithm, the file it is written to, and what the file is of."""

"""The checks themselves, and their table."""

"""The checks of the conformance kit, and their table."""

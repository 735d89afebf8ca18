"""The state that numbers are computed at, and what is watched of it."""

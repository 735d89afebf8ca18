"""Losses whose derivatives, factors and draws are written down."""

"""Passes over the data that every problem offers: counts, loss and gradient, numbers that identify models."""

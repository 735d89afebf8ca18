"""Passes over the data that every problem offers: counts, the loss and its gradient, numbers that tell models apart."""

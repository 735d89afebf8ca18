"""Gradients of single samples: their norms and noise, and their inner products with solutions."""

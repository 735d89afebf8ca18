"""What the gradients of single samples tell: their norms and noise, and their inner products with solutions."""

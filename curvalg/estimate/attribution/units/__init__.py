"""Parameters on which an operator acts by itself, and gradients of samples in the coordinates it likes there."""

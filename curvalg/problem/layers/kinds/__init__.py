"""One file for each kind of layer: its inputs and deltas, and the gradients they stand for."""

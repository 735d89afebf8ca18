"""Tensors and nothing else: trees of them, sums over batches, columns, graphs, uniforms, memory."""

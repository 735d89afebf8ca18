"""Layer inputs and output deltas: the gradients of many output directions, held without multiplying them out."""

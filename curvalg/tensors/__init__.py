"""Tensors and nothing else: trees of them, sums over batches, columns, graphs, uniforms, memory."""

from curvalg.tensors import trees
from curvalg.tensors.batch_sums import BatchSum
from curvalg.tensors.memory import free_memory

__all__ = ["BatchSum", "free_memory", "trees"]

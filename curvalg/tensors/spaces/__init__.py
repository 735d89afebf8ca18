"""The spaces that vectors are in: their sums, maxima and random vectors, whether one process holds all numbers or a part."""

from curvalg.tensors.spaces import long_vectors
from curvalg.tensors.spaces.sharded_space import Exchanger, ShardedSpace
from curvalg.tensors.spaces.vector_space import Summand, VectorSpace, space_of

__all__ = ["Exchanger", "ShardedSpace", "Summand", "VectorSpace", "long_vectors", "space_of"]

"""Matrices in forms that make functions of them exact: spectra with cheap bases, low-rank updates, blocks."""

from curvalg.lowering.matrices.bases import Basis, KroneckerBasis, MatrixBasis, UnitBasis, placed
from curvalg.lowering.matrices.block_matrix import Blocks
from curvalg.lowering.matrices.congruent import Congruent
from curvalg.lowering.matrices.dense_matrix import DenseMatrix
from curvalg.lowering.matrices.inverted import Inverted
from curvalg.lowering.matrices.kronecker_cholesky import KroneckerCholesky
from curvalg.lowering.matrices.kronecker_lu import KroneckerLU
from curvalg.lowering.matrices.spectral import Spectral
from curvalg.lowering.matrices.structure import Eigh, Structure, singular
from curvalg.lowering.matrices.woodbury import Woodbury

__all__ = [
    "Basis",
    "Blocks",
    "Congruent",
    "DenseMatrix",
    "Eigh",
    "KroneckerCholesky",
    "KroneckerLU",
    "Inverted",
    "KroneckerBasis",
    "MatrixBasis",
    "Spectral",
    "Structure",
    "UnitBasis",
    "Woodbury",
    "placed",
    "singular",
]

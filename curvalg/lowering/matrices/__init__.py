"""Matrices in forms that make functions of them exact: spectra with cheap bases, low-rank updates, blocks."""

from curvalg.lowering.matrices.base import Eigh, Structure, singular
from curvalg.lowering.matrices.bases import Basis, KroneckerBasis, MatrixBasis, UnitBasis
from curvalg.lowering.matrices.blocks import Blocks
from curvalg.lowering.matrices.congruent import Congruent
from curvalg.lowering.matrices.dense import Dense
from curvalg.lowering.matrices.factorized import Factorized
from curvalg.lowering.matrices.inverted import Inverted
from curvalg.lowering.matrices.spectral import Spectral
from curvalg.lowering.matrices.woodbury import Woodbury

__all__ = [
    "Basis",
    "Blocks",
    "Congruent",
    "Dense",
    "Eigh",
    "Factorized",
    "Inverted",
    "KroneckerBasis",
    "MatrixBasis",
    "Spectral",
    "Structure",
    "UnitBasis",
    "Woodbury",
    "singular",
]

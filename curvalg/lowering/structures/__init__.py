"""Matrices in forms that make functions of them exact: spectra with cheap bases, low-rank updates, blocks."""

from curvalg.lowering.structures.base import Eigh, Structure, singular
from curvalg.lowering.structures.bases import Basis, KroneckerBasis, MatrixBasis, UnitBasis
from curvalg.lowering.structures.blocks import Blocks
from curvalg.lowering.structures.congruent import Congruent
from curvalg.lowering.structures.dense import Dense
from curvalg.lowering.structures.factorized import Factorized
from curvalg.lowering.structures.inverted import Inverted
from curvalg.lowering.structures.spectral import Spectral
from curvalg.lowering.structures.woodbury import Woodbury

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

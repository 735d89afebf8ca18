"""Estimators by products alone, resumable: eigenpairs, densities, functions of operators, each with its error."""

from curvalg.estimate.curve import Density
from curvalg.estimate.density import spectral_density
from curvalg.estimate.effective_dimension import effective_dimension
from curvalg.estimate.eigen import eigsh
from curvalg.estimate.functions import FunctionProduct, matrix_function
from curvalg.estimate.logdet import logdet
from curvalg.estimate.result import Eigenpairs, Estimate, Result
from curvalg.estimate.singular import SingularTriplets, svds

__all__ = [
    "Density",
    "Eigenpairs",
    "Estimate",
    "FunctionProduct",
    "Result",
    "SingularTriplets",
    "effective_dimension",
    "eigsh",
    "logdet",
    "matrix_function",
    "spectral_density",
    "svds",
]

"""Estimators by products alone, resumable: eigenpairs, densities, traces, functions of operators, each with its error."""

from curvalg.estimate.curve import Density
from curvalg.estimate.density import spectral_density
from curvalg.estimate.diagonal import diagonal
from curvalg.estimate.effective_dimension import effective_dimension
from curvalg.estimate.eigen import eigsh
from curvalg.estimate.functions import FunctionProduct, matrix_function
from curvalg.estimate.influence import bilinear, influence
from curvalg.estimate.logdet import logdet
from curvalg.estimate.noise import GradientNoise, gradient_noise, gradient_norms
from curvalg.estimate.norm import norm
from curvalg.estimate.pictures import heat_map
from curvalg.estimate.result import Eigenpairs, Estimate, Result
from curvalg.estimate.singular import SingularTriplets, svds
from curvalg.estimate.tic import tic
from curvalg.estimate.trace import trace

__all__ = [
    "Density",
    "Eigenpairs",
    "Estimate",
    "FunctionProduct",
    "GradientNoise",
    "Result",
    "SingularTriplets",
    "bilinear",
    "diagonal",
    "effective_dimension",
    "eigsh",
    "gradient_noise",
    "gradient_norms",
    "heat_map",
    "influence",
    "logdet",
    "matrix_function",
    "norm",
    "spectral_density",
    "svds",
    "tic",
    "trace",
]

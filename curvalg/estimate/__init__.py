"""Estimators by products alone, resumable: eigenpairs, densities, traces, functions of operators, each with its error."""

from curvalg.estimate.functions.effective_dimension import effective_dimension
from curvalg.estimate.functions.logdet import logdet
from curvalg.estimate.functions.matrix_function import FunctionProduct, matrix_function
from curvalg.estimate.gradients.gradient_noise import GradientNoise, gradient_noise, gradient_norms
from curvalg.estimate.gradients.influence import bilinear, influence
from curvalg.estimate.pictures import heat_map
from curvalg.estimate.result import Eigenpairs, Estimate, Result
from curvalg.estimate.spectra.curve import Density
from curvalg.estimate.spectra.density import spectral_density
from curvalg.estimate.spectra.eigen import eigsh
from curvalg.estimate.spectra.singular import SingularTriplets, svds
from curvalg.estimate.traces.diagonal import diagonal
from curvalg.estimate.traces.norm import norm
from curvalg.estimate.traces.tic import tic
from curvalg.estimate.traces.trace import trace

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

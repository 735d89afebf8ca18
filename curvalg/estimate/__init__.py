"""Estimators by products alone, resumable: eigenpairs, densities, traces, functions of operators, each with its error."""

from curvalg.estimate.attribution.influence import influence, influence_stream
from curvalg.estimate.attribution.influence_scores import InfluenceScores, ScoreBatch
from curvalg.estimate.attribution.rank_error import RankError
from curvalg.estimate.attribution.ranking import Ranking
from curvalg.estimate.attribution.self_influence import self_influence
from curvalg.estimate.functions.effective_dimension import effective_dimension
from curvalg.estimate.functions.logdet import logdet
from curvalg.estimate.functions.matrix_function import FunctionProduct, matrix_function
from curvalg.estimate.gradients.bilinear import bilinear
from curvalg.estimate.gradients.functional_variance import functional_variance
from curvalg.estimate.gradients.gradient_noise import GradientNoise, gradient_noise, gradient_norms
from curvalg.estimate.pictures import heat_map
from curvalg.estimate.result import Eigenpairs, Estimate, Result
from curvalg.estimate.saliency import Saliency, saliency
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
    "InfluenceScores",
    "RankError",
    "Ranking",
    "Result",
    "Saliency",
    "ScoreBatch",
    "SingularTriplets",
    "bilinear",
    "diagonal",
    "effective_dimension",
    "eigsh",
    "functional_variance",
    "gradient_noise",
    "gradient_norms",
    "heat_map",
    "influence",
    "influence_stream",
    "logdet",
    "matrix_function",
    "norm",
    "saliency",
    "self_influence",
    "spectral_density",
    "svds",
    "tic",
    "trace",
]

"""Estimators: eigenpairs, singular triplets, traces, norms and diagonals by products alone; resumable, with their errors."""

from curvalg.estimate.diagonal import diagonal
from curvalg.estimate.eigen import eigsh
from curvalg.estimate.norm import norm
from curvalg.estimate.result import Eigenpairs, Estimate, Result
from curvalg.estimate.singular import SingularTriplets, svds
from curvalg.estimate.trace import trace

__all__ = ["Eigenpairs", "Estimate", "Result", "SingularTriplets", "diagonal", "eigsh", "norm", "svds", "trace"]

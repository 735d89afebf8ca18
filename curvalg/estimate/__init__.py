"""Estimators: eigenpairs and singular triplets by products alone, resumable, with true residuals."""

from curvalg.estimate.eigen import eigsh
from curvalg.estimate.result import Eigenpairs, Estimate, Result
from curvalg.estimate.singular import SingularTriplets, svds

__all__ = ["Eigenpairs", "Estimate", "Result", "SingularTriplets", "eigsh", "svds"]

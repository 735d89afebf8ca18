"""Kronecker-factored approximations, found through entry points, and what is done with their factors."""

from curvalg_plugins.kronecker.averages import average_factors, damp_factors
from curvalg_plugins.kronecker.ekfac import EKFAC
from curvalg_plugins.kronecker.kfac import FOOF, KFAC
from curvalg_plugins.kronecker.kfoc import KFOC

__all__ = ["EKFAC", "FOOF", "KFAC", "KFOC", "average_factors", "damp_factors"]

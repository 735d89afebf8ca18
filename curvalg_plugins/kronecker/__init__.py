"""Kronecker-factored approximations, found through entry points: KFAC, EKFAC and FOOF."""

from curvalg_plugins.kronecker.ekfac import EKFAC
from curvalg_plugins.kronecker.kfac import FOOF, KFAC

__all__ = ["EKFAC", "FOOF", "KFAC"]

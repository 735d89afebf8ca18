"""Hessian products by differences of gradients, for models without a second derivative; found through entry points."""

from curvalg_plugins.differences.hessian import HessianDifference

__all__ = ["HessianDifference"]

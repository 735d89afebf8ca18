"""Random projections of the gradients of single samples, and the scores of TRAK that are made of them."""

from curvalg_plugins.projections.projected_gradients import project_gradients
from curvalg_plugins.projections.trak import trak_scores

__all__ = ["project_gradients", "trak_scores"]

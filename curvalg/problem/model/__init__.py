"""The model as a function of its parameters, their flat layout, and what it returns."""

from curvalg.problem.model.outputs import OutputForm

__all__ = ["OutputForm"]

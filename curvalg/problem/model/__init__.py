"""The model as a function of its parameters, their flat layout, its state, and what it and its layers return."""

from curvalg.problem.model.outputs import OutputForm

__all__ = ["OutputForm"]

"""The model as a function of its parameters, their flat layout, and what it returns."""

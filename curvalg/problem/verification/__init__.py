"""What is verified before it is believed: calls, graphs, tangents and second derivatives of the user's model.

Torch's formulas are not all right, hooks and custom functions may alter gradients, and a model may read parameters, random
numbers or a state in ways that an exchange of its parameters does not reach. Each check is an identity that needs no other
route; it is made once and remembered, at a structure of the problem where it is about the model's code, and at a state where
it depends on the numbers too. ``Problem(verify=False)`` leaves all of them out.
"""

from curvalg.problem.verification.tangent_checks import TangentNotes

__all__ = ["TangentNotes"]

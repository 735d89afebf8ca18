"""Every exception and warning of curvalg.

All derive from :class:`CurvalgError`, so one ``except`` catches the library. Where Python or SciPy users expect a
built-in kind (a wrong shape or count is a ``ValueError``, a wrong type a ``TypeError``, a missing name a ``LookupError``),
the class derives from that too.
Messages say what was expected, what came, and what to do.
"""

from __future__ import annotations


class CurvalgError(Exception):
    """Base of everything curvalg raises."""


class ExpressionError(CurvalgError, TypeError):
    """An expression that has no meaning (mismatched domains, ``A + 0.1``) or that cannot be read or lowered."""


class OptionError(ExpressionError, ValueError):
    """An option of the wrong type or out of its range: a count below one, or a choice that does not exist."""


class RegistryError(CurvalgError, LookupError):
    """A term that cannot be found, imported or built by name."""


class TermOptionError(RegistryError, OptionError):
    """A name that is not allowed, or an option that does not fit the signature of its term."""


class ProblemError(CurvalgError, ValueError):
    """A model, parameter selection or data set that curvature cannot be computed for."""


class NotFiniteError(ProblemError):
    """A product, or an array that was given, with NaN or infinite entries."""


class ProblemTypeError(ProblemError, TypeError):
    """A model, data set or selection of a kind that no problem can be made of."""


class LossError(CurvalgError, ValueError):
    """A loss, an option of it, or a target that is not supported or does not fit the output."""


class LossTypeError(LossError, TypeError):
    """A value that is not a loss."""


class FactsError(CurvalgError, ValueError):
    """An operation needs a fact (symmetry, definiteness, a likelihood) that does not hold or is not known."""


class VectorError(CurvalgError, ValueError):
    """An operand of a product with the wrong shape, kind, dtype, device or non-finite entries."""


class VectorTypeError(VectorError, TypeError):
    """An operand that is not a vector of numbers."""


class ConvergenceError(CurvalgError, RuntimeError):
    """An iterative method stopped before it reached the asked tolerance.

    Attributes:
        result: the result so far, with the best iterate; None where there is none.
    """

    def __init__(self, message: str, result: object = None) -> None:
        super().__init__(message)
        self.result = result


class StaleError(CurvalgError, RuntimeError):
    """Model, loss or data changed after the operator was lowered; ``operator.refresh()`` takes them as they are now."""


class GroupError(CurvalgError, RuntimeError):
    """Processes that share a problem and do not fit together, or of which one failed: raised on all of them."""


class CheckpointError(CurvalgError, ValueError):
    """A checkpoint file that is of another run, of something else, or damaged; the message names what differs."""


class ConformanceError(CurvalgError, AssertionError):
    """A term does not keep the contract of terms; the message lists every check that failed and what to do.

    Attributes:
        failures: check name -> message.
    """

    def __init__(self, message: str, failures: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.failures = dict(failures or {})


class CurvalgWarning(UserWarning):
    """Something that is allowed but seldom meant, such as a model that ignores its parameters."""

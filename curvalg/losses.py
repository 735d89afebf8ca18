"""Losses with closed forms in output space, and the base class to write another.

>>> from curvalg.losses import CrossEntropy
>>> CrossEntropy(label_smoothing=0.1, class_axis=-1).facts.convex
True
"""

from curvalg.problem.losses import *  # noqa: F403
from curvalg.problem.losses import __all__ as __all__

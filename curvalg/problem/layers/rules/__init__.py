"""What the calls of torch's functions are: single layers, several layers in one, or another arrangement of a parameter."""

from curvalg.problem.layers.rules import attention, recurrent
from curvalg.problem.layers.rules.registrations import SUMS, TABLE
from curvalg.problem.layers.rules.unfused import UNFUSED
from curvalg.problem.layers.rules.views import followed

__all__ = ["SUMS", "TABLE", "UNFUSED", "attention", "followed", "recurrent"]

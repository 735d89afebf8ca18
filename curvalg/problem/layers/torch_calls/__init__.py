"""What the calls of torch's functions are: single layers, several layers in one, or another arrangement of a parameter."""

from curvalg.problem.layers.torch_calls import attention, recurrent
from curvalg.problem.layers.torch_calls.registrations import SUMS, TABLE
from curvalg.problem.layers.torch_calls.unfused import UNFUSED
from curvalg.problem.layers.torch_calls.views import followed

__all__ = ["SUMS", "TABLE", "UNFUSED", "attention", "followed", "recurrent"]

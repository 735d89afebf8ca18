"""Runs that can be stopped and resumed: the state of an algorithm, the file it is written to, and what the file is of."""

from curvalg.runs.checkpoint import Checkpoint
from curvalg.runs.run import run
from curvalg.runs.run_state import State
from curvalg.runs.unit import Outgrown

__all__ = ["Checkpoint", "Outgrown", "State", "run"]

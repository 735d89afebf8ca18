"""Problems: models, losses, data and parameters that expressions are lowered on."""

from curvalg.problem.batch import Batch
from curvalg.problem.evaluation import Evaluation
from curvalg.problem.layers import LayerRecord
from curvalg.problem.parameters import Layout
from curvalg.problem.problem import Problem
from curvalg.problem.snapshot import Snapshot

__all__ = ["Batch", "Evaluation", "LayerRecord", "Layout", "Problem", "Snapshot"]

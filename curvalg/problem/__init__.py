"""Problems: models, losses, data and parameters that expressions are lowered on."""

from curvalg.problem.batch import Batch, Samples
from curvalg.problem.evaluation import Evaluation
from curvalg.problem.large_outputs.find_head import has_large_outputs, push_hidden, record_head
from curvalg.problem.large_outputs.head import Head
from curvalg.problem.model.layer_record import FactorPairs, LayerRecord
from curvalg.problem.model.parameters import Layout
from curvalg.problem.model.snapshot import Snapshot
from curvalg.problem.passes.gradient_field import GradientField
from curvalg.problem.problem import Problem

__all__ = [
    "Batch",
    "Evaluation",
    "FactorPairs",
    "GradientField",
    "Head",
    "LayerRecord",
    "Layout",
    "Problem",
    "Samples",
    "Snapshot",
    "has_large_outputs",
    "push_hidden",
    "record_head",
]

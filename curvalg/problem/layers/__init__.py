"""Layer inputs and output deltas: the gradients of many output directions, held without multiplying them out."""

from curvalg.problem.layers.notes import LayerNotes
from curvalg.problem.layers.per_sample import LAST, ROUTES, PerSampleNotes, per_sample_gradients
from curvalg.problem.layers.recorded import RecordedLayers, record_layers
from curvalg.problem.layers.routing import is_steady
from curvalg.problem.layers.torch_calls import TABLE
from curvalg.problem.layers.verify import ROWS
from curvalg.problem.model.layer_record import LayerRecord

__all__ = [
    "LAST",
    "ROUTES",
    "ROWS",
    "TABLE",
    "LayerNotes",
    "LayerRecord",
    "PerSampleNotes",
    "RecordedLayers",
    "is_steady",
    "per_sample_gradients",
    "record_layers",
]

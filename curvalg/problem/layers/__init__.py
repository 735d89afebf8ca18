"""Layer inputs and output deltas: the gradients of many output directions, held without multiplying them out."""

from curvalg.problem.layers.record import LayerRecord
from curvalg.problem.layers.recorded import RecordedLayers, record_layers

__all__ = ["LayerRecord", "RecordedLayers", "record_layers"]

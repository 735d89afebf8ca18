"""The hierarchical decomposition of the Gauss-Newton matrix of softmax cross-entropy, found through entry points.

GGN = class + cross + within + same: Papyan, "Traces of Class/Cross-Class Structure Pervade Deep Learning Spectra"
(arXiv 2008.11865).
"""

from curvalg_plugins.hierarchical.factories import ggn_class, ggn_cross, ggn_same, ggn_within

__all__ = ["ggn_class", "ggn_cross", "ggn_same", "ggn_within"]

"""Files of expressions and results, which outlive the process that computed them."""

from curvalg.files.loading import load
from curvalg.files.saving import save

__all__ = ["load", "save"]

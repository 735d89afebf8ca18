"""Problems of models of other libraries, with their own conventions of batches, labels and losses."""

from __future__ import annotations

from curvalg.integrations import huggingface

__all__ = ["huggingface"]

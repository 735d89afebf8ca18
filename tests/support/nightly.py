"""How thorough random tests are."""

from __future__ import annotations

import os

NIGHTLY = os.environ.get("CURVALG_NIGHTLY") == "1"
"""Whether the thorough versions of random tests run."""

"""curvalg without anything kept: each product records anew, which is what peers do and what large models need."""

from __future__ import annotations

from benchmarks.peers.curvalg import Curvalg


class CurvalgFresh(Curvalg):
    """Products alone; the rest would be the same again."""

    name = "curvalg fresh"
    settles = 3
    only = ("products", "memory")
    options = {"cache": 0}  # noqa: RUF012

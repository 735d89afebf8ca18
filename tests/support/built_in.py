"""The problems that the command line has built in, by name."""

from __future__ import annotations

from curvalg.cli.made_problems.list_problems import BUILT_IN

__all__ = ["BUILT_IN"]

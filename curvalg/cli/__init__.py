"""The command line: ``curvalg terms``, ``curvalg eigs`` and ``curvalg explain``.

Commands import what they compute with when they run, so that ``curvalg --help`` answers at once.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command line on ``sys.argv``; the entry point ``curvalg``."""
    from curvalg.cli.app import app
    from curvalg.cli.report import prepare_streams

    prepare_streams()
    app(prog_name="curvalg")

"""The command line: ``curvalg --help`` lists its commands.

Commands import what they compute with when they run, so that ``curvalg --help`` answers at once.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run the command line on ``sys.argv``, together with the other processes where torchrun started several."""
    import os

    from curvalg.cli.app import app
    from curvalg.cli.report import prepare_streams

    prepare_streams()
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        from curvalg.cli.together import run_together

        run_together()
    app(prog_name="curvalg")

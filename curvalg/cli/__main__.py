"""The entry point of ``python -m curvalg.cli``."""

from curvalg.cli import main

main()

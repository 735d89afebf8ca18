"""The entry point of ``python -m curvalg`` and of ``torchrun -m curvalg``."""

from curvalg.cli import main

main()

"""The commands and their flags. What a command computes and prints is in :mod:`curvalg.cli.work`, imported when it runs."""

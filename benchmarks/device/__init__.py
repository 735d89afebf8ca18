"""What only a device can tell: ``python -m benchmarks.device`` checks and times curvalg on a GPU in minutes.

Nothing here imports torch: the simulated device has to be there before it.
"""

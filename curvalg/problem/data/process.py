"""What all problems of a process share: random generators, and switches of torch that hold for every thread."""

import threading

LOCK = threading.RLock()
"""Held while a model, a loss or a loader of the user's runs."""

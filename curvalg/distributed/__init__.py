"""Several processes that share one problem, started by torchrun: each has a part of the data, all get the whole result."""

from curvalg.distributed.dealing import dealt as dealt
from curvalg.distributed.shard import shard as shard
from curvalg.distributed.start import start as start

__all__ = ["dealt", "shard", "start"]

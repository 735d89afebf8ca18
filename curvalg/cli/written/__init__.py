"""Files that commands write: pictures of ``--plot`` and results of ``--out``."""
